"""Move the divisor of a layer's inputs into the weights of the module that produces them, if a run proves it right."""
