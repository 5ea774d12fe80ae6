"""IRPO (arXiv 2404.19733)."""
