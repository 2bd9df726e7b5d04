"""The layer that computes on integer codes: its kernels, and its form in a ``state_dict``."""
