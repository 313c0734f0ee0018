"""The one exception for what a user can mend: its message is a clear sentence of what, where, and what to do."""

from collections.abc import Sequence

_FEW = 10


class UserError(Exception):
    """Wrong input or surroundings. Jobs print the message without a traceback and exit with status 2."""


def first_few(names: Sequence[str], total: int | None = None) -> str:
    """The first ten names for a message, and how many more there are; total if the names are not all."""
    more = (len(names) if total is None else total) - min(len(names), _FEW)
    return ", ".join(names[:_FEW]) + (f" and {more} more" if more else "")
