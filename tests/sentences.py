"""What a user reads when input is refused."""

from __future__ import annotations

from collections.abc import Callable

from crate_ray.errors import UserError


def sentence_of(action: Callable[[], object]) -> str:
    """The message of the UserError that an action raises; empty if it raises none. Other errors are raised."""
    try:
        action()
    except UserError as error:
        return str(error)
    return ""
