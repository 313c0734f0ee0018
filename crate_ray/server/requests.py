"""What a client asks: the images and params of an HTTP request. The JSON forms are those of MLflow's protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

COLUMN = "image"
_RAW = ("application/octet-stream", "application/x-npy")
_FORMS = ("inputs", "instances", "dataframe_records", "dataframe_split")


class Refusal(Exception):  # noqa: N818 - it is an answer, not a failure
    """A request that is answered with a status and one sentence."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.status = status


class Asked(NamedTuple):
    """A request for an output."""

    images: list[Any]
    """Images as `received_image` takes them."""
    params: dict[str, Any]
    """Params of `InferenceParams`, unchecked; those of a query string are texts."""


def parse_request(content_type: str, query: Mapping[str, str], body: bytes) -> Asked:
    """Parse a request: JSON with images in base64 or as arrays, or the bytes of one image.

    Args:
        content_type: the header.
        query: the query string, which holds the params for the bytes of an image.
        body: the body.

    Raises:
        Refusal: it has another form.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind in _RAW:
        return Asked([body], dict(query))
    if kind != "application/json":
        raise Refusal(
            f"Content-Type {kind!r} is not known; send application/json, image/jpeg, image/png, image/webp, "
            "application/x-npy or application/octet-stream",
            415,
        )
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the body is not JSON ({error})") from None
    forms = ", ".join(repr(form) for form in _FORMS)
    if not isinstance(document, dict):
        raise Refusal(f"the body is not a JSON object; give one with {forms}")
    params = document.pop("params", None) or {}
    if not isinstance(params, dict):
        raise Refusal('\'params\' is not a JSON object; give one such as {"output": "cls"}')
    if len(document) != 1 or not document.keys() <= set(_FORMS):
        raise Refusal(f"the body must have one of {forms}, and may have 'params'; it has {sorted(document)[:5]}")
    ((form, value),) = document.items()
    return Asked(_images(form, value), params | dict(query))


def _images(form: str, value: Any) -> list[Any]:
    """The images of a form."""
    if form == "dataframe_split":
        if isinstance(value, dict) and isinstance(rows := value.get("data"), list):
            columns = value.get("columns") or [COLUMN]
            if columns != [COLUMN]:
                raise Refusal(f"dataframe_split has the columns {columns}; give one, {COLUMN!r}")
            if all(isinstance(row, list) and len(row) == 1 for row in rows):
                return [row[0] for row in rows]
        raise Refusal(f'dataframe_split is not such as {{"columns": ["{COLUMN}"], "data": [["…base64…"]]}}')
    if form == "inputs" and isinstance(value, dict):
        if set(value) != {COLUMN}:
            raise Refusal(f"'inputs' names {sorted(value)[:5]}; it takes {COLUMN!r} alone")
        value = value[COLUMN]
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise Refusal(f"{form!r} is not a list of images")
    if not any(isinstance(row, dict) for row in value):
        return value
    if not all(isinstance(row, dict) and set(row) == {COLUMN} for row in value):
        raise Refusal(f'the entries of {form!r} are not all such as {{"{COLUMN}": "…base64…"}}')
    return [row[COLUMN] for row in value]
