"""Sampling completions from the current policy."""
