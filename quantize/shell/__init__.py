"""The imperative shell: a config, a walk over the model, and the layers that calibrate and compute.

Each line may import from those above it, and from no other::

    config progress offload        the config as frozen values; a progress bar; models dispatched by accelerate
    modes values                   torch's global state; arguments that can be copied and passed again
    views                          linear layers that a model stores in another form
    report/                        how every layer was quantized: rows as data and text, picture
    plan                           the only walk over a model: which layers are quantized, and why the others are not
    deploy/                        the layer on integer codes, its kernels, its state
    fold/                          scales that move from the inputs of layers into the modules that make the inputs
    calibrate/                     the layer that observes its inputs, the session of a model, and the solver
    budget                         a format for every layer under a limit of bytes
    disk/                          all files that are written or read
    api                            the public calls
    cli/                           python -m quantize
"""
