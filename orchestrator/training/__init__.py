"""The training loop and everything that a rank needs around it, from the run directory to
callbacks.
"""
