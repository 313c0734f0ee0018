"""Decoding of JPEG regions by the system's libjpeg-turbo 3, if it is installed.

It is loaded with ctypes, because the Python packages of libjpeg-turbo do not expose this interface.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import os
import threading
import weakref
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from crate_ray.errors import UserError

LIBRARY_VARIABLE = "CRATE_RAY_TURBOJPEG"
"""Environment variable with the path of the library. Empty: do not use it."""

# From turbojpeg.h, TurboJPEG API 3.
_TJINIT_DECOMPRESS = 1
_TJPARAM_STOPONWARNING = 0
_TJPARAM_JPEGWIDTH = 5
_TJPARAM_JPEGHEIGHT = 6
_PIXEL_FORMATS = {1: 6, 3: 0, 4: 2}
"""TJPF_GRAY, TJPF_RGB, TJPF_RGBX by channels."""


class Region(NamedTuple):
    """A rectangle of the image in pixels, at the scale it is decoded at. `left` must be at the edge of an MCU."""

    top: int
    left: int
    height: int
    width: int


class RegionError(ValueError):
    """The library could not decode a region: the image is damaged, or can only be decoded as a whole."""


class _ScalingFactor(ctypes.Structure):
    _fields_ = (("num", ctypes.c_int), ("denom", ctypes.c_int))


class _CroppingRegion(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("x", "y", "w", "h"))


class TurboJpeg:
    """The library, with one decompressor per thread."""

    def __init__(self, path: str) -> None:
        # ctypes releases the GIL during calls of a CDLL, but not of a PyDLL, whose short calls are cheaper.
        slow, quick = ctypes.CDLL(path), ctypes.PyDLL(path)
        handle, size, pointer, integer = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
        self._init, self._init.argtypes, self._init.restype = quick.tj3Init, (integer,), handle
        self._destroy, self._destroy.argtypes, self._destroy.restype = quick.tj3Destroy, (handle,), None
        self._set, self._set.argtypes = quick.tj3Set, (handle, integer, integer)
        self._get, self._get.argtypes = quick.tj3Get, (handle, integer)
        self._error, self._error.argtypes, self._error.restype = quick.tj3GetErrorStr, (handle,), ctypes.c_char_p
        self._header, self._header.argtypes = quick.tj3DecompressHeader, (handle, pointer, size)
        self._scale, self._scale.argtypes = quick.tj3SetScalingFactor, (handle, _ScalingFactor)
        self._crop, self._crop.argtypes = quick.tj3SetCroppingRegion, (handle, _CroppingRegion)
        self._decompress = slow.tj3Decompress8
        self._decompress.argtypes = (handle, pointer, size, pointer, integer, integer)
        self._local = threading.local()

    def decode(
        self,
        content: bytes | memoryview,
        hw: tuple[int, int],
        region: Region,
        out: NDArray[np.uint8],
        channels: int,
        factor: int = 1,
    ) -> None:
        """Decode a region of a JPEG at 1/factor scale.

        Args:
            content: the JPEG.
            hw: height and width from its header, which have been checked; an image of another size is refused.
            region: what to decode.
            out: contiguous (height, width, channels).
            channels: 1 (luma), 3 (RGB) or 4 (RGB and an undefined one).
            factor: reduction of the scale.

        Raises:
            RegionError: at the first error or warning.
        """
        handle = self._handle()
        source = np.frombuffer(content, np.uint8)  # keeps the address valid
        address, size = _address(source), len(source)
        if out.nbytes != region.height * region.width * channels or not out.flags.c_contiguous:
            raise ValueError(f"a buffer of {out.shape} does not hold {region} with {channels} channels")
        self._check(handle, self._header(handle, address, size))
        found = (self._get(handle, _TJPARAM_JPEGHEIGHT), self._get(handle, _TJPARAM_JPEGWIDTH))
        if found != hw:
            raise RegionError(f"it has {found[1]}×{found[0]} pixels, not {hw[1]}×{hw[0]}")
        self._check(handle, self._scale(handle, _ScalingFactor(1, factor)))
        corner = _CroppingRegion(region.left, region.top, region.width, region.height)
        self._check(handle, self._crop(handle, corner))
        self._check(handle, self._decompress(handle, address, size, _address(out), 0, _PIXEL_FORMATS[channels]))

    def _handle(self) -> int:
        handle: int | None = getattr(self._local, "handle", None)
        if handle is None:
            handle = self._init(_TJINIT_DECOMPRESS)
            if not handle:
                raise MemoryError("libjpeg-turbo cannot make a decompressor")
            self._check(handle, self._set(handle, _TJPARAM_STOPONWARNING, 1))
            self._local.handle = handle
            # Not at exit, when threads may still be decoding.
            weakref.finalize(threading.current_thread(), self._destroy, handle).atexit = False
        return handle

    def _check(self, handle: int, status: int) -> None:
        if status != 0:
            raise RegionError((self._error(handle) or b"unknown error").decode("utf-8", "replace"))


def _address(array: NDArray[np.uint8]) -> int:
    address: int = array.__array_interface__["data"][0]  # much faster than array.ctypes
    return address


@functools.cache
def find_turbojpeg() -> TurboJpeg | None:
    """The system's library, or None if there is none of version 3.

    Raises UserError if the environment variable names a library that cannot be used.
    """
    named = os.environ.get(LIBRARY_VARIABLE)
    path = ctypes.util.find_library("turbojpeg") if named is None else named
    if not path:
        return None
    try:
        return TurboJpeg(path)
    except (OSError, AttributeError) as error:  # it is not a library, or it is of version 2
        if named is None:
            return None
        raise UserError(
            f"{LIBRARY_VARIABLE} names {path}, which is not libturbojpeg of libjpeg-turbo 3 ({error}): "
            "correct or unset the variable"
        ) from error
