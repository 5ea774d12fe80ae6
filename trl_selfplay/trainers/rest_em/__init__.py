"""ReST, ReST^EM and rejection-sampling fine-tuning (arXiv 2308.08998, 2312.06585, 2308.01825)."""
