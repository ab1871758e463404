"""Callbacks: transformers' interface, ours, and the trackers."""
