"""The preference losses, and the module that computes a step."""
