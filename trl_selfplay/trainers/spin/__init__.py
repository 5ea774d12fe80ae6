"""SPIN (arXiv 2401.01335)."""
