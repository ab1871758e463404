"""Engines: wrapping, gradients, optimizer state and the learning-rate schedule."""
