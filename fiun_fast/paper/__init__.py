"""The paper's comparison (arXiv 2408.08493) on its four networks, with digits, on held-out data."""
