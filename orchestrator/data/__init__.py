"""Data pipeline: preference rows on disk to the micro-batches of one rank."""
