"""UserError, for everything that a user can fix. Its message says what is wrong, where, and what to do."""

from collections.abc import Sequence

_FEW = 10


class UserError(Exception):
    """Wrong input or environment. Jobs print the message without a traceback and exit with status 2."""


def first_few(names: Sequence[str], total: int | None = None) -> str:
    """The first ten names for a message, and how many more there are. Give `total` if `names` is not the whole list."""
    more = (len(names) if total is None else total) - min(len(names), _FEW)
    return ", ".join(names[:_FEW]) + (f" and {more} more" if more else "")
