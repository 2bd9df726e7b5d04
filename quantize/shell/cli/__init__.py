"""``python -m quantize``: the command line, and the models of transformers that it quantizes and measures."""
