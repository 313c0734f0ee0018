"""UserError, for everything that a user can fix. Its message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from crate_ray.addresses import Address, redact

if TYPE_CHECKING:
    from pydantic import ValidationError

_FEW = 10


class UserError(Exception):
    """Wrong input or environment. Jobs print the message without a traceback and exit with status 2.

    Messages quote input and other libraries' errors, so secrets in them are hidden.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(message))


def address_of(name: str, text: str) -> Address:
    """The address that an environment variable holds. Raises UserError if it is not valid."""
    try:
        return Address(text)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def first_few(names: Sequence[str], total: int | None = None) -> str:
    """The first ten names for a message, and how many more there are. Give `total` if `names` is not the whole list."""
    more = (len(names) if total is None else total) - min(len(names), _FEW)
    return ", ".join(names[:_FEW]) + (f" and {more} more" if more else "")


def invalid_value(error: ValidationError) -> str:
    """The first problem of a record that was read from storage, for a message: where it is, and what is wrong."""
    problem = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return " ".join(f"{where}: {message}".split()) if where else message
