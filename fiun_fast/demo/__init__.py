"""The demo: four inheritance networks on real digits, trained, asked to forget, measured."""
