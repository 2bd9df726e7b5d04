"""The imperative shell: a config, a walk over the model, and the layers that calibrate and compute."""
