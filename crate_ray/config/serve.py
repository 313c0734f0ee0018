"""Settings of `crate-ray serve`."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Self

from pydantic import Field, model_validator

from crate_ray.config.base import Advanced, PositiveInt, Settings
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig


class ServeConfig(Settings):
    """Serve a model over HTTP on Ray Serve. When the alias in `model` moves, the new version takes over."""

    model: str = "models:/crate-mae@champion"
    """Model to serve: a run's folder (its newest checkpoint), <run>@<step>, <run>@best (lowest validation loss), a
    checkpoint's folder, the folder of an exported model, models:/<name>@<alias>, models:/<name>/<version>,
    runs:/<MLflow run id>, or a published checkpoint (.pth, .pt, .ckpt, .bin, .safetensors)."""
    host: str = "127.0.0.1"
    """Address to listen on. All but those of this machine alone need `token_env`; 0.0.0.0 is every network."""
    port: Annotated[int, Field(gt=0, lt=2**16)] = 8000
    """Port to listen on."""
    token_env: str | None = None
    """Name of an environment variable with a token of at least 16 characters. Requests must then have the header
    `Authorization: Bearer TOKEN`."""
    replicas: PositiveInt = 1
    """Copies of the model. They share the CPUs of the cluster."""
    gpu: bool | None = None
    """Give each replica a GPU; by default if the cluster has enough."""
    batch_size: PositiveInt = 32
    """Most images in one forward pass. Requests that arrive meanwhile are computed together."""
    poll_seconds: Annotated[float, Field(gt=0)] = 30.0
    """Seconds between lookups of the alias. A new version is loaded beside the old one, and replaces it when it is
    ready."""
    batch_wait_seconds: Advanced[Annotated[float, Field(ge=0)]] = 0.005
    """Seconds that the first request of a batch waits for others."""
    max_body_bytes: Advanced[PositiveInt] = 2**26
    """Largest body of a request."""
    max_images: Advanced[PositiveInt] = 256
    """Most images in a request."""
    max_queued_requests: Advanced[PositiveInt] = 1000
    """Requests that may wait while all replicas are busy. Others are answered with status 503."""
    request_seconds: Advanced[Annotated[float, Field(gt=0)]] = 120.0
    """Seconds after which a request is answered with status 408."""
    drain_seconds: Advanced[Annotated[float, Field(gt=0, le=50)]] = 30.0
    """Seconds that requests in progress have to finish after SIGTERM or Ctrl-C."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow, for models:/ and runs:/."""
    s3: S3Config = S3Config()
    """Object storage."""

    @model_validator(mode="after")
    def _check_access(self) -> Self:
        if self.token_env is None and not self.is_private:
            raise ValueError(
                f"host {self.host} can be reached from other machines; set token_env to the name of an environment "
                "variable with a token, or leave host at 127.0.0.1"
            )
        return self

    @property
    def is_private(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
