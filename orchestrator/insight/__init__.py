"""Analysis of finished runs from their run directories, without torch."""
