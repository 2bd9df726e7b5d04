"""Models for every test that rebuilds models: small, and each with one habit that may go wrong.

``sequential`` and ``effects``: models for calibration in the order of execution. ``folding``: models for folding scales
into what makes the inputs. ``layers``: models for the life of a layer from float to converted.
"""
