"""What a run is: every setting, the rules between them, and how YAML becomes one."""
