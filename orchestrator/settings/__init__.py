"""Settings of a run: fields, the rules between them, and loading from YAML."""
