"""Memory of a run before it begins: weights, training, sampling, from configurations alone."""
