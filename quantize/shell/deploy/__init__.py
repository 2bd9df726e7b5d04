"""The layer that computes on integer codes: one module, one kernel contract, and its state in a ``state_dict``."""
