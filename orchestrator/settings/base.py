"""The base of every block of settings: its class, the types of numbers, and user code by name."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from orchestrator.settings.errors import UserError

# Limit of every count: larger numbers would overflow in tensors.
MOST = 10**12
Positive = Annotated[int, Field(ge=1, le=MOST)]
NonNegative = Annotated[int, Field(ge=0, le=MOST)]
# torch allows 64 bits, and each rank adds its rank
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
FREE: dict[str, Any] = {"resume": "free"}
"""Marks a field that may change on resume: it does not affect what a step computes, except its
rounding.
"""


class Block(BaseModel):
    """Frozen group of settings; the docstring under a field is its description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    def check(self) -> None:
        """Check the rules between the settings of this block.

        Raises:
            UserError: the first rule that is violated.
        """


class UserCodeSpec(Block):
    """User code, as {path, kwargs}; a plain module:attr is its path."""

    path: str
    """A class, function or object as module:attr."""
    kwargs: dict[str, Any] = {}
    """Keyword arguments of the class's constructor, or of the function."""

    @model_validator(mode="before")
    @classmethod
    def _wrap_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value


def check_user_code(key: str, value: str) -> None:
    """Check that a setting has the form module:attr.

    Raises:
        UserError: it does not.
    """
    module, colon, attribute = value.partition(":")
    if colon and attribute and (module.endswith(".py") or "/" in module):
        meant = module.removesuffix(".py").lstrip("./").replace("/", ".")
        cure = f"did you mean {meant}:{attribute}?"
        raise UserError(key, value, "names a file, not a module", cure)
    if not (colon and module and attribute):
        cure = "for example my_package.my_module:my_name"
        raise UserError(key, value, "is not of the form module:attr", cure)
