"""Encode values for JSON without losing the types of their keys."""

from typing import Any


def encode(value: Any) -> Any:
    """Encode a value for JSON without loss: schedulers have dicts with integer keys (MultiStepLR's
    milestones), which JSON would turn into strings.
    """
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {"__items__": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor; torch is not loaded only to ask for its class
        return value.tolist()
    return value


def decode(value: Any) -> Any:
    """Return the value that `encode` encoded, with lists for tuples and tensors."""
    if isinstance(value, dict):
        if set(value) == {"__items__"}:
            return {decode(key): decode(item) for key, item in value["__items__"]}
        return {key: decode(item) for key, item in value.items()}
    return [decode(item) for item in value] if isinstance(value, list) else value
