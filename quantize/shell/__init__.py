"""The imperative shell: a config, a walk over the model, and the layers that calibrate and compute.

Modules on a line may only import from the lines above it::

    config progress offload        the config as frozen values; a progress bar; models dispatched by accelerate
    modes values                   torch's global state; arguments that can be copied and passed again
    views                          linear layers that a model stores in another form
    report/                        how every layer was quantized: rows as data and text, picture
    plan                           which layers of a model are quantized, and why the others are not
    deploy/                        the layer on integer codes, its kernels, its state
    fold/                          moves the scales of inputs into the modules that produce these inputs
    calibrate/                     the layer that observes its inputs, the session of a model, and the solver
    budget                         a format for every layer under a limit of bytes
    disk/                          reads and writes all files
    api                            the public calls
    cli/                           python -m quantize
"""
