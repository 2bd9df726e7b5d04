"""Everything that is written or read: calibrations, converted models, and checkpoints for other programs."""
