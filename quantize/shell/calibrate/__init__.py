"""Observe the inputs of layers, then quantize them: all after one pass or layer by layer, on one process or several."""
