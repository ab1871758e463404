"""What every rank does, from the run directory to the training loop."""
