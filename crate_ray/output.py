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
    """Guard this process's standard output and standard error."""
    remember_environment()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or hasattr(stream, "with_controls"):
            continue
        with suppress(AttributeError, ValueError):  # a stream of a test or a notebook
            stream.reconfigure(errors="backslashreplace")  # an encoding without some letters
        setattr(sys, name, GuardedStream(stream))


def visible(text: str) -> str:
    """A text from outside, such as a file's name, with all characters that do not print written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
        except BrokenPipeError:
            self._discard()
        except OSError:  # a full disk, a terminal that is gone
            pass
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._discard()
        except OSError:
            pass

    def _discard(self) -> None:
        """Send everything from now on, and what is buffered, to nowhere: the reader is gone, as after `| head`."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
