"""The policy, its frozen reference, and log-probs from hidden states."""
