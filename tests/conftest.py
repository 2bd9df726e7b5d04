from tests.shared import unchanged_global_state

__all__ = ["unchanged_global_state"]
