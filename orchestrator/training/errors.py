"""The error that ends a training."""


class TrainingError(Exception):
    """The error of a training that cannot continue: one line with rank, step and fix."""
