"""Train on Ray, and submit runs to a Ray cluster."""
