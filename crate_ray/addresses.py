"""Addresses of servers without their secrets, and texts without secrets.

    http://user:p%40ss@host:5000?token=x&timeout=5      as it is given: `full`
    http://host:5000?timeout=5                          the address itself: what is stored, compared and shown

An address may hold a password or a token, which its structure shows. A process remembers the secrets it has seen, and
`redact` hides them in any text, as a second net.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|//")
_DATABASE = re.compile(r"(postgres(ql)?|mysql|mariadb|mssql|oracle)\b")
_HARMLESS = frozenset(
    {
        "application_name", "cache", "charset", "check_same_thread", "connect_timeout", "driver", "mode", "region",
        "scheme", "sslmode", "sslrootcert", "ssl_ca", "timeout", "uri",
    }
)  # fmt: skip
"""Parameters whose values are no secrets. All others are hidden."""

_NAMES = r"(?:pass(?:word|wd|phrase)?|pwd|token|secret|sig(?:nature)?|credentials?|auth(?:orization)?|api[_-]?key|key)"
_IN_TEXT = (
    # user:password@, a token@, or a password with '@' in it
    (re.compile(r"(//)[^\s/'\"<>]*@"), r"\1***@"),
    # a password with '/' or spaces in it; what follows a colon is no port
    (re.compile(r"(//)[^\s/:@'\"<>]*:(?!\d{1,5}(?:[^\w]|$))[^\s'\"<>]*@"), r"\1***@"),
    (re.compile(r"(//)[^\s/:@'\"<>]*:(?!\d{1,5}(?:[^\w]|$))[^/@\n'\"<>]*@"), r"\1***@"),
    (re.compile(rf"([?&][\w.-]*{_NAMES}=)[^&\s'\"<>]+", re.IGNORECASE), r"\1***"),
    (re.compile(r"(\b(?:password|passwd|pwd|secret|token)=)[^&\s'\",;<>]+", re.IGNORECASE), r"\1***"),
)
_SECRET_VARIABLE = re.compile(r"(PASSWORD|PASSWD|TOKEN|SECRET|SECRET_ACCESS_KEY|API_KEY)$")
_SHORTEST = 4  # characters of a secret of an address; hiding shorter ones would make texts unreadable
_SHORTEST_IN_ENVIRONMENT = 8  # there, a name alone says that it is a secret

_known: set[str] = set()


class _Parts(NamedTuple):
    scheme: str
    userinfo: str
    place: str
    parameters: list[str]
    fragment: str


class Address(str):
    """Address of a server. As text it has no secrets; `full` is as it was given.

    Raises:
        ValueError: user name and password hold a character that must be percent-encoded, or there is no scheme.
    """

    full: str
    """As it was given."""

    def __new__(cls, text: str) -> Address:
        parts = _split(text)
        clean = _clean(parts)
        if clean != text:
            _remember(parts)
            if any(c in parts.userinfo for c in "/?#"):
                raise ValueError(
                    f"{_shown(parts)!r} has one of / ? # in its user name or password, or an @ after its host; write "
                    "them percent-encoded, as %2F %3F %23 %40"
                )
            if not parts.scheme:
                raise ValueError(f"{_shown(parts)!r} has no scheme; write it such as http://host:port")
        self = super().__new__(cls, clean)
        self.full = text
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Address, (self.full,)

    @property
    def login(self) -> tuple[str, str] | None:
        """User name and password, decoded; None if the address has none."""
        name, _, password = _split(self.full).userinfo.partition(":")
        return (unquote(name), unquote(password)) if name or password else None


def has_secret(address: str) -> bool:
    """Whether an address of a folder holds a user name, a password, or a parameter that is named like a secret.

    False for a text that `redact` has returned. Such texts are stored.
    """
    return any(pattern.sub(replacement, address) != address for pattern, replacement in _IN_TEXT)


def redact(text: str) -> str:
    """A text without the secrets in its addresses, and without the other secrets that this process knows."""
    for secret in sorted(_known, key=len, reverse=True):
        text = text.replace(secret, "***")
    for pattern, replacement in _IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def remember_environment(environment: Mapping[str, str] | None = None) -> None:
    """Note the secrets in environment variables, so that `redact` hides them."""
    for name, value in (os.environ if environment is None else environment).items():
        if _SECRET_VARIABLE.search(name) and len(value) >= _SHORTEST_IN_ENVIRONMENT:
            _known.add(value)
        elif "://" in value and "@" in value and not any(c.isspace() for c in value):
            _remember(_split(value))


def _split(address: str) -> _Parts:
    match = _SCHEME.match(address)
    scheme = match[0] if match else ""
    rest, userinfo = address[len(scheme) :], ""
    has_host = not rest.startswith("/") if scheme else "@" in rest.partition("/")[0]  # sqlite:///file has none
    if has_host and "@" in rest:
        userinfo, _, rest = rest.rpartition("@")
    fragment = ""
    if has_host:
        rest, _, fragment = rest.partition("#")
    place, _, query = rest.partition("?")
    return _Parts(scheme, userinfo, place, query.split("&") if query else [], fragment)


def _clean(parts: _Parts) -> str:
    """The address without secrets. A database's user name stays, since only its password is a secret."""
    user = parts.userinfo.partition(":")[0]
    kept = f"{user}@" if user and _DATABASE.match(parts.scheme) else ""
    harmless = [p for p in parts.parameters if p.partition("=")[0].lower() in _HARMLESS]
    return parts.scheme + kept + parts.place + ("?" + "&".join(harmless) if harmless else "")


def _shown(parts: _Parts) -> str:
    return parts.scheme + ("***@" if parts.userinfo else "") + parts.place


def _remember(parts: _Parts) -> None:
    name, colon, password = parts.userinfo.partition(":")
    secrets = [password if colon or not parts.scheme.startswith("http") else name]
    for parameter in [*parts.parameters, *parts.fragment.split("&")]:
        key, equals, value = parameter.partition("=")
        if equals and key.lower() not in _HARMLESS:
            secrets.append(value)
    for secret in secrets:
        decoded = unquote(secret)
        _known.update(form for form in (secret, decoded, quote(decoded, safe="")) if len(form) >= _SHORTEST)
