"""What a run has to tell afterwards; reads run directories, loads no torch."""
