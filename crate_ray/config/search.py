"""Settings of `crate-ray search`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from crate_ray.config.base import Advanced, Settings
from crate_ray.config.storage import S3Config
from crate_ray.config.training import TrackingConfig


class SearchConfig(Settings):
    """Find the images of an embedded dataset that are most similar to an image, and draw them."""

    embeddings: str
    """Folder that crate-ray embed wrote: local folder or s3://bucket/prefix."""
    query: str
    """An image file (local path or s3://bucket/name), or a key, a name or a sample number of the embedded dataset."""
    neighbours: Annotated[int, Field(ge=1, le=1000)] = 10
    """Number of images to find."""
    picture: str | None = "neighbours.png"
    """PNG file for the picture: the query first, then its neighbours. null: none."""
    data: str | None = None
    """The dataset, if it is no longer where it was when it was embedded: local folder or s3://bucket/prefix."""
    model: Advanced[str | None] = None
    """The model, if it is no longer where it was: any form that `crate-ray embed --model` takes."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow, for models:/ and runs:/."""
    s3: S3Config = S3Config()
    """Object storage."""
