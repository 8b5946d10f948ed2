"""What other people's unlearning code calls, on top of the public API: change an import, keep the code."""
