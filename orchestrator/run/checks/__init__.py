"""Check machines, files and the hub before a run starts."""
