"""Images as clients of a served model send them: encoded bytes, base64 text, data URLs, or pixels."""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crate_ray.config import Kind
from crate_ray.data.decode.errors import DecodeError

_DATA_URL = re.compile(rb"data:[^,]{0,200};base64,", re.IGNORECASE)
_BASE64 = re.compile(rb"[A-Za-z0-9+/\-_]+={0,2}")
_WHITE = b" \t\r\n"


def received_image(value: Any, kind: Kind) -> bytes | NDArray[Any]:
    """The encoded image or the array that a client means.

    Args:
        value: bytes; base64 text, also after `data:image/png;base64,` or in the URL-safe alphabet; or pixels, as an
            array or nested lists.
        kind: what the model takes. Pixels of images are whole numbers from 0 to 255.

    Raises:
        DecodeError: it is nothing of this kind.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, str):
        content = _from_base64(value.encode("utf-8", "replace"))
        if content is None:
            raise DecodeError("the text is not base64", "not_an_image")
        return content
    if isinstance(value, bytes | bytearray | memoryview):
        content = bytes(value)
        # No format that is decoded consists of the characters of base64 alone.
        return (_from_base64(content) if content[:1].isascii() else None) or content
    if isinstance(value, list | tuple | np.ndarray):
        return _pixels(value, kind)
    if value is None or value != value:  # a missing cell of a table is NaN
        raise DecodeError("it is missing", "empty")
    raise DecodeError(f"it is a {type(value).__name__}", "not_an_image")


def _from_base64(text: bytes) -> bytes | None:
    """The bytes that a base64 text stands for; None if it is another text."""
    text = text.strip(_WHITE)
    if url := _DATA_URL.match(text):
        text = text[url.end() :]
    text = text.translate(None, _WHITE)
    if not text:
        return b""
    digits = len(text.rstrip(b"="))
    if not _BASE64.fullmatch(text) or digits % 4 == 1:
        return None
    return base64.b64decode(text[:digits] + b"=" * (-digits % 4), b"-_" if b"-" in text or b"_" in text else None)


def _pixels(value: Any, kind: Kind) -> NDArray[Any]:
    """An array of a dtype that the decoders take."""
    try:
        array = np.array(value)  # from a table, an array may hold one array per row
        if array.dtype == object:
            array = np.array(array.tolist())
        if array.dtype.kind in "SU":  # MLflow turns numbers in `inputs` and `instances` into text
            array = array.astype(np.float64)
    except ValueError:
        raise DecodeError("it is no array of numbers whose rows have the same length", "wrong_shape") from None
    if array.dtype.kind not in "biuf":
        raise DecodeError("its pixels are not numbers", "not_numbers")
    if kind == "grid" or array.dtype == np.uint8:
        return array
    whole = (
        array.astype(np.uint8, casting="unsafe") if array.size and (0 <= array).all() and (array <= 255).all() else None
    )
    if whole is None or not (whole == array).all():
        raise DecodeError("its pixels are not whole numbers from 0 to 255", "not_an_image")
    return whole
