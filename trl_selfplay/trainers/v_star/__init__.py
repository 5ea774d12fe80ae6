"""V-STaR's verifier (arXiv 2402.06457)."""
