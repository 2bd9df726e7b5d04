"""All files that are written and read: calibrations, converted models, and checkpoints for other programs."""
