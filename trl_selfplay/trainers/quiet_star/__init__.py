"""Quiet-STaR (arXiv 2403.09629)."""
