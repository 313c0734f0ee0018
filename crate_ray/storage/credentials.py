"""Says which AWS credentials the driver has and a worker lacks. Names of variables are passed on, and never values.

Ray writes runtime environments to its logs and shows them in its dashboard, so the values must not be in them. Workers
find the credentials of their own node.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

_PASSED_ON = "CRATE_RAY_DRIVER_CREDENTIALS"
_VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)


def names_here() -> dict[str, str]:
    """An environment variable for workers that names what this process has its credentials from."""
    names = [name for name in _VARIABLES if os.environ.get(name)]
    file = Path(os.path.expanduser("~/.aws/credentials"))  # noqa: PTH111 - leaves '~' if there is no home
    return {_PASSED_ON: ",".join([*names, *(["~/.aws/credentials"] if file.is_file() else [])])}


def only_on_driver() -> str | None:
    """Sentence about what the driver has and this process lacks; None in the driver, or if there is nothing."""
    passed = [name for name in os.environ.get(_PASSED_ON, "").split(",") if name]
    lacking = [name for name in passed if name in _VARIABLES and not os.environ.get(name)]
    if "~/.aws/credentials" in passed and not os.path.isfile(os.path.expanduser("~/.aws/credentials")):  # noqa: PTH111, PTH113
        lacking.append("~/.aws/credentials")
    if not lacking:
        return None
    return (
        f"the driver has {' and '.join(lacking)}, and node {socket.gethostname()} does not: set the same where Ray is "
        "started on each node, before ray start, or give the nodes a role"
    )
