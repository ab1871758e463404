"""Write counts in messages, with the singular noun for one."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, whose plural ends in s, in singular or plural.

    >>> counted(1, "training pair"), counted(2, "step")
    ('1 training pair', '2 steps')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
