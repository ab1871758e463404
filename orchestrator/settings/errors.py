"""The errors that end a run, each printed as one line (cli.py turns them into exit codes)."""

from typing import Any

LONGEST_MESSAGE = 300  # characters of an exception's message in one of our lines


def message_of(error: BaseException) -> str:
    """Return the message of an exception on one line, shortened."""
    message = " ".join(str(error).split())
    return message if len(message) <= LONGEST_MESSAGE else f"{message[:LONGEST_MESSAGE]} ..."


def type_and_message(error: BaseException) -> str:
    """Return the type and the message of an exception on one line."""
    return ": ".join(filter(None, (type(error).__name__, message_of(error))))


class UserError(Exception):
    """Error of the user's input, printed as one line with key, value, rule and fix. Exit code 2.

    `key` is a setting ("batch.micro_batch_size") or a place in the data ("pairs.jsonl row 17").
    """

    def __init__(self, key: str, value: object, rule: str, cure: str) -> None:
        # all four are args, because errors are pickled between processes
        super().__init__(key, value, rule, cure)
        self.key, self.value, self.rule, self.cure = key, value, rule, cure

    def __str__(self) -> str:
        value = "(not set)" if self.value is None else repr(self.value)
        if len(value) > 120:
            value = value[:117] + "..."
        return " ".join(f"{self.key} = {value}: {self.rule}; {self.cure}".split())


class SettingsError(UserError):
    """One or more settings are wrong; `str` gives one line for each."""

    def __init__(self, errors: list[UserError]) -> None:
        super().__init__(errors[0].key, errors[0].value, errors[0].rule, errors[0].cure)
        self.errors = errors

    def __str__(self) -> str:
        return "\n".join(str(error) for error in self.errors)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.errors,)


class TrainingError(Exception):
    """Error of a training that cannot continue, the same on every rank: one line with step and
    fix. Exit code 1.
    """


class RunDied(Exception):
    """Error: workers died more often than cluster.max_failures allows, without a new checkpoint,
    or no usable nodes were left after a death.

    Exit code 1.
    """
