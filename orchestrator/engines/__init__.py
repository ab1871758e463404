"""Who owns gradients, optimizer state and the schedule."""
