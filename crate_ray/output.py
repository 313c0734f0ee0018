"""What a process prints: without secrets, without control characters from data, and never a reason to fail."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from typing import Any, TextIO

from crate_ray.addresses import redact, remember_environment

# Control characters and those that reorder text. Colours, tabs and ends of lines stay, since libraries print them.
_CONTROL = re.compile(
    r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b\x0c\x0e-\x1a\x1c-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)


def guard_output() -> None:
    """Guard this process's standard output and standard error.

    Text that goes to a file or a pipe is UTF-8 in every locale, unless PYTHONIOENCODING says otherwise.
    """
    remember_environment()
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if hasattr(stream, "with_controls"):
            continue
        if stream is None:  # the process was started without it
            _open_nowhere(number)
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        with suppress(AttributeError, ValueError, OSError):  # a stream of a test or a notebook
            os.set_blocking(stream.fileno(), True)  # a reader may have set it otherwise, and text would be lost
        with suppress(AttributeError, ValueError, OSError):
            chosen = os.environ.get("PYTHONIOENCODING") or stream.isatty()
            stream.reconfigure(encoding=None if chosen else "utf-8", errors="backslashreplace")
        setattr(sys, name, GuardedStream(stream))


def _open_nowhere(number: int) -> None:
    """Open a closed file descriptor, so that no other file gets its number, and with it what libraries print."""
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)


def visible(text: str) -> str:
    """A text from outside, such as a file's name, with all characters that do not print written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shortened(text: str, longest: int = 4000) -> str:
    """A text of at most about `longest` characters: if it is longer, its middle is left out and counted."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} … ({len(text) - 2 * half:,} characters left out) … {text[-half:]}"


class GuardedStream:
    """A text stream that hides secrets, shows control characters as escapes, and outlives its reader.

    Args:
        stream: the stream to write to.
        escape: show control characters as escapes. Off for our own live displays.
    """

    def __init__(self, stream: TextIO, *, escape: bool = True) -> None:
        self._stream, self._escape = stream, escape

    @property
    def with_controls(self) -> GuardedStream:
        """The same stream for text whose parts from outside are escaped already, as progress.console does."""
        return GuardedStream(self._stream, escape=False)

    def write(self, text: str) -> int:
        """Write a text, or drop it if nobody can receive it."""
        shown = redact(text)
        if self._escape:
            shown = _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), shown)
        try:
            self._stream.write(shown)
        except UnicodeEncodeError:  # a stream that could not be reconfigured
            self.write(shown.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError) as error:
            self._give_up(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Drop everything from now on, and what is buffered: nobody can receive it.

        That the reader is gone, as after `| head`, is normal. Anything else, such as a full disk, is said once.
        """
        with suppress(OSError, ValueError):
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            if number == 1 and not isinstance(error, BrokenPipeError):
                cause = getattr(error, "strerror", None) or error
                print(f"warning: the rest of standard output was lost ({cause})", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
