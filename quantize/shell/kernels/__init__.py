"""The matmuls of deployed layers: one interface, one file a backend."""
