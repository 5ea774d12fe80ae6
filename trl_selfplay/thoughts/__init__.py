"""Thoughts of Quiet-STaR: layout, attention, sampling, mixing, objective, the model that thinks."""
