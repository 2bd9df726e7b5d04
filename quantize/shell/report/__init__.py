"""What was done to every layer, and what was left out: rows of values, a table, a picture. Knows no layer."""
