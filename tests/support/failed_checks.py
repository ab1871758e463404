"""The checks that have failed."""

from orchestrator.run.checks.report import Check


def wrong(checks: list[Check]) -> list[Check]:
    return [check for check in checks if not check.ok]
