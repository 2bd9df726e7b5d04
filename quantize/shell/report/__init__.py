"""The report of a model: rows of values, their text, and a picture. It imports no layer."""
