"""The result of a check, and results as a table or as one error."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from orchestrator.settings.errors import SettingsError, UserError


@dataclass(frozen=True)
class Check:
    """Result of one check on one node."""

    name: str  # a setting ("run.dir"), a library, or a measured quantity
    node: str  # empty if there is only one machine
    value: str
    wrong: str = ""  # the problem; empty if there is none
    cure: str = ""

    @property
    def ok(self) -> bool:
        """Return whether the check passed."""
        return not self.wrong


def refusal(checks: Iterable[Check]) -> UserError | None:
    """Return an error with one line for each failed check; None if all passed."""
    errors = [
        UserError(
            f"{check.name} on {check.node}" if check.node else check.name,
            check.value,
            check.wrong,
            check.cure,
        )
        for check in merged(checks)
        if not check.ok
    ]
    return SettingsError(errors) if errors else None


def raise_failed(checks: Iterable[Check]) -> None:
    """Raise the error of the failed checks, if any.

    Raises:
        UserError: every failed check, one line each.
    """
    if (error := refusal(checks)) is not None:
        raise error


def table(checks: Iterable[Check]) -> str:
    """Return a table with one line per distinct result, with the fix after a failure."""
    checks = merged(checks)
    rows = [
        ("ok" if check.ok else "RED", check.name, check.node or "here", check.value)
        for check in checks
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for check, row in zip(checks, rows, strict=True):
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        if not check.ok:
            cells.append(f"{check.wrong}; {check.cure}")
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def merged(checks: Iterable[Check]) -> list[Check]:
    """Merge checks that differ only in their node."""
    nodes: dict[Check, list[str]] = {}
    for check in checks:
        nodes.setdefault(replace(check, node=""), []).append(check.node)
    return [replace(check, node=listed(where)) for check, where in nodes.items()]


def listed(nodes: Iterable[str]) -> str:
    """Return the names of nodes as text, shortened if there are many."""
    names = list(dict.fromkeys(nodes))
    if len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:3])} and {len(names) - 3} more"


def size_text(count: float) -> str:
    """Return bytes as text with a suitable unit."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
