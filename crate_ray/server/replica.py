"""The Ray Serve deployment: answers HTTP requests, computes them in batches, and swaps the model when there is another.

A request is parsed and decoded in a thread, waits for a batch, and keeps the model that it was decoded for. So a swap
fails no request.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import ray
import torch
from ray import serve
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from torch import Tensor

from crate_ray.errors import UserError
from crate_ray.served_model import InferenceParams, ServedModel
from crate_ray.server.requests import Refusal, parse_request
from crate_ray.server.shelf import build

T = TypeVar("T")

VERSION_HEADER = "crate-ray-model-version"
_PROBES = ("/ping", "/health")
_RETRY_SECONDS = 10
_log = logging.getLogger("ray.serve")


class Work(NamedTuple):
    """Images of one request that are computed together."""

    model: ServedModel
    params: InferenceParams
    images: Tensor


class Loaded(NamedTuple):
    """A version that is ready."""

    version: str
    model: ServedModel


class Replica:
    """A copy of the model.

    Args:
        shelf: the Shelf actor.
        token: SHA-256 of the token that clients must send; None for no token.
        settings: batch_size, batch_wait_seconds, max_body_bytes, max_images, cpus, and gpu of this replica.
    """

    def __init__(self, shelf: Any, token: str | None, settings: dict[str, Any]) -> None:
        self._shelf, self._token, self._settings = shelf, token, settings
        self._device = "cuda" if settings["gpu"] else "cpu"
        self._failed: BaseException | None = None
        torch.set_num_threads(settings["cpus"])
        self._decoders = ThreadPoolExecutor(settings["cpus"], "decode")
        self._compute: Callable[[Work], Any] = serve.batch(
            max_batch_size=settings["batch_size"],
            batch_wait_timeout_s=settings["batch_wait_seconds"],
            batch_size_fn=lambda works: sum(len(work.images) for work in works),
        )(_compute)

    async def reconfigure(self, _: dict[str, Any]) -> None:
        """Load the model. Ray Serve calls this once, before it sends requests."""
        self._loaded = await self._load(None)
        self._follower = asyncio.create_task(self._follow())

    async def check_health(self) -> None:
        """Ray Serve restarts a replica for which this raises: one whose model has failed, or runs no more."""
        if self._failed is not None:
            raise RuntimeError("the model has failed") from self._failed

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        try:
            return await self._answer(request)
        except Refusal as refusal:
            return _json({"error_code": _CODES.get(refusal.status, "BAD_REQUEST"), "message": str(refusal)}, refusal)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception:
            _log.exception("a request failed")
            message = "the server failed; its log says why"
            return _json({"error_code": "INTERNAL_ERROR", "message": message}, Refusal(message, 500))

    async def _answer(self, request: Request) -> Response:
        path = request.url.path.rstrip("/")
        if path in _PROBES and request.method in ("GET", "HEAD"):
            return Response("\n", media_type="text/plain")
        self._check_token(request.headers.get("authorization", ""))
        loaded = self._loaded
        headers = {VERSION_HEADER: loaded.version}
        if path == "/model" and request.method == "GET":
            return _json(_describe(loaded), headers=headers)
        if path != "/invocations":
            raise Refusal("there is no such page; there are /invocations, /model, /ping and /health", 404)
        if request.method != "POST":
            raise Refusal("/invocations takes POST requests", 405)
        body = await self._body(request)
        works = await self._in_thread(lambda: self._decode(loaded.model, request, body))
        try:
            outputs = await asyncio.gather(*map(self._compute, works))
        except Exception as error:
            self._failed = error
            raise
        content = await self._in_thread(lambda: json.dumps({"predictions": torch.cat(outputs).tolist()}).encode())
        return Response(content, media_type="application/json", headers=headers)

    def _check_token(self, authorization: str) -> None:
        if self._token is None:
            return
        scheme, _, token = authorization.partition(" ")
        digest = hashlib.sha256(token.strip().encode("latin-1")).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._token):
            raise Refusal("the token is missing or wrong; send the header 'Authorization: Bearer TOKEN'", 401)

    async def _body(self, request: Request) -> bytes:
        limit = self._settings["max_body_bytes"]
        too_large = Refusal(f"the body has more than {limit:,} bytes; send fewer images at once", 413)
        if (length := request.headers.get("content-length", "")).isdecimal() and int(length) > limit:
            raise too_large
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    def _decode(self, model: ServedModel, request: Request, body: bytes) -> list[Work]:
        """The work of a request, in parts that fit into a batch."""
        images, given = parse_request(request.headers.get("content-type", ""), request.query_params, body)
        most, size = self._settings["max_images"], self._settings["batch_size"]
        if len(images) > most:
            raise Refusal(f"the request has {len(images):,} images; send at most {most:,} at once")
        try:
            params = model.params(given)
            return [
                Work(model, params, model.receive(images[start : start + size], start + 1, len(images)))
                for start in range(0, max(1, len(images)), size)
            ]
        except UserError as error:
            raise Refusal(str(error)) from None

    async def _in_thread(self, task: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, task)

    async def _follow(self) -> None:
        """Load each new version beside the one in use."""
        while True:
            try:
                self._loaded = await self._load(self._loaded.version)
            except ray.exceptions.RayActorError:
                return  # the driver is gone, and with it all that would bring another version
            except Exception:
                _log.exception("a new version could not be loaded; the old one stays")
                await asyncio.sleep(_RETRY_SECONDS)

    async def _load(self, name: str | None) -> Loaded:
        version = await self._shelf.other_than.remote(name)
        weights = await version.weights[0]
        model = await asyncio.to_thread(build, version.description, weights, self._device)
        return Loaded(version.name, model)


async def _compute(works: list[Work]) -> list[Tensor]:
    """Compute a batch. Work for the same model with the same params is one forward pass."""
    return await asyncio.to_thread(_compute_together, works)


def _compute_together(works: list[Work]) -> list[Tensor]:
    groups: dict[tuple[int, InferenceParams], list[int]] = {}
    for index, work in enumerate(works):
        groups.setdefault((id(work.model), work.params), []).append(index)
    found: dict[int, Tensor] = {}
    for (_, params), members in groups.items():
        images = torch.cat([works[index].images for index in members])
        output = works[members[0]].model(images, params)
        found |= zip(members, output.split([len(works[index].images) for index in members]), strict=True)
    return [found[index] for index in range(len(works))]


_CODES = {400: "INVALID_PARAMETER_VALUE", 401: "UNAUTHENTICATED", 404: "ENDPOINT_NOT_FOUND"}


def _json(values: Any, status: Refusal | None = None, headers: dict[str, str] | None = None) -> Response:
    code = 200 if status is None else status.status
    more = {"WWW-Authenticate": "Bearer"} if code == 401 else {}
    return Response(json.dumps(values).encode(), code, (headers or {}) | more, "application/json")


def _describe(loaded: Loaded) -> dict[str, Any]:
    """What clients may want to know of the model."""
    description = loaded.model.description
    return {
        "version": loaded.version,
        "outputs": loaded.model.outputs,
        "default_output": loaded.model.outputs[0],
        "kind": description.kind,
        "image_size": description.model.image_hw,
        "channels": description.model.channels,
        "step": description.step,
        "run_key": description.run_key,
    }
