"""The imperative shell: a config, a walk over the model, and the layers that calibrate and compute.

Each line may import from those above it, and from no other::

    config progress offload        a dict as frozen values; a bar; what accelerate keeps elsewhere
    modes values                   the state of torch; what can be kept and given again
    views                          linear layers that a model keeps in another form
    report/                        what was done to every layer: rows as data and text, picture
    plan                           the only walk over a model: which layers are quantized, and why the others are not
    deploy/                        the layer on integer codes, its kernels, its state
    fold/                          scales that move from the inputs of layers into the modules that make them
    calibrate/                     the layer that observes, the session of a model, and solving
    budget                         a format for every layer under a limit of bytes
    disk/                          all files that are written or read
    api                            the public calls
    cli/                           python -m quantize
"""
