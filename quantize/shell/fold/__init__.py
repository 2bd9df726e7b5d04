"""Move the divisor of a layer's inputs into the module that makes them: found in a run of the model, and proven."""
