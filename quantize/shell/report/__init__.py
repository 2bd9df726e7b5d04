"""What was done to every layer, and what was left out: rows of values, their text, a picture. Knows no layer."""
