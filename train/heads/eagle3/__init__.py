"""The EAGLE3 draft head (arXiv 2503.01840)."""
