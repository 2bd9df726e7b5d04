"""Watch the inputs of layers, then solve: in one pass, or layer after layer in lock step; alone, or with ranks."""
