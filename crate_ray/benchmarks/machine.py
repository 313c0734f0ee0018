"""Describes the machine and the library versions that benchmark figures depend on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from crate_ray.data.decode.turbojpeg import find_turbojpeg

_LIBRARIES = ("crate-ray", "torch", "webdataset", "pillow", "simplejpeg", "numpy", "boto3", "spdl", "litdata")


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, versions, and whether libjpeg-turbo 3 is used."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in filter(_installed, _LIBRARIES)},
        "libjpeg_turbo_3": find_turbojpeg() is not None,
    }


def _installed(name: str) -> bool:
    return any(importlib.metadata.distributions(name=name))
