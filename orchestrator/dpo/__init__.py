"""The preference loss, and the one module that computes it."""
