"""STaR (arXiv 2203.14465)."""
