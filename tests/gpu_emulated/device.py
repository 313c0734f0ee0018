"""An emulated CUDA device, for tests of GPU paths on a machine without a GPU. Install it before torch is imported.

`device.cpp` makes torch take `cuda:0` for a real device: values are real, tensors on several devices may not be mixed,
and autocast works. This file stands in for the parts of `torch.cuda` that need a driver, and records what a GPU would
make the host wait for. Timing is not emulated: streams order nothing, but each recorded event has its stream.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("device.cpp")
_PACKAGE = Path(__file__).parents[2] / "crate_ray"
_TORCH = Path(next(iter(importlib.util.find_spec("torch").submodule_search_locations or ())))  # type: ignore[union-attr]
NAME = "NVIDIA H200"


class Event(NamedTuple):
    """Something that happened on the device."""

    kind: str
    """sync: the host waits for the device. copy: an asynchronous copy. allocation. record_stream. wait: of a stream."""
    detail: str
    where: str
    """Line of crate_ray that caused it; empty if there is none."""
    thread: str
    stream: str
    """The thread's current stream."""


_events: list[Event] = []
_streams = threading.local()


@contextmanager
def recorded() -> Iterator[list[Event]]:
    """The events of all threads while the block runs."""
    first = len(_events)
    found: list[Event] = []
    yield found
    found += _events[first:]


def position() -> int:
    """Number of events so far."""
    return len(_events)


def since(first: int) -> list[Event]:
    """The events after a position."""
    return _events[first:]


def syncs(events: list[Event], thread: str | None = None) -> list[Event]:
    """Where the host waited; on one thread, or on all."""
    return [event for event in events if event.kind == "sync" and thread in (None, event.thread)]


def _record(kind: str, detail: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_PACKAGE.as_posix())]
    where = f"{frames[-1].filename.removeprefix(_PACKAGE.as_posix())[1:]}:{frames[-1].lineno}" if frames else ""
    _events.append(Event(kind, detail, where, threading.current_thread().name, _current().name))


# --- Streams and events ---------------------------------------------------------------------------------------------


def install() -> None:
    """Make the device available to torch in this process, which must not have imported torch: it looks for devices
    then."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; run these tests with `-p tests.gpu_emulated.plugin`")
    library = _build()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL((_TORCH / "lib" / name).as_posix(), mode=ctypes.RTLD_GLOBAL)
    emulated = ctypes.CDLL(library.as_posix(), mode=ctypes.RTLD_GLOBAL)
    signature = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
    global _callback  # must outlive the library
    _callback = signature(lambda kind, detail: _record(kind.decode(), detail.decode()))
    emulated.emulated_device_report_to(_callback)
    _replace_functions(emulated)


def _build() -> Path:
    """The compiled device.cpp, built once for each version of it and of torch."""
    version = (_TORCH / "version.py").read_bytes()
    name = hashlib.sha256(SOURCE.read_bytes() + version).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"crate-ray-emulated-gpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{name}.so"
    if not library.exists():
        unfinished = folder / f"{name}.{os.getpid()}"
        includes = [f"-I{_TORCH / 'include'}", f"-I{_TORCH / 'include/torch/csrc/api/include'}"]
        links = [f"-L{_TORCH / 'lib'}", f"-Wl,-rpath,{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
        command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", *includes, SOURCE.as_posix()]
        subprocess.run([*command, "-o", unfinished.as_posix(), *links], check=True)
        unfinished.rename(library)
    return library


def _current() -> Any:
    return getattr(_streams, "current", _DEFAULT)


def _replace_functions(library: ctypes.CDLL) -> None:
    """Stand in for the functions of torch.cuda that need a driver."""
    import torch

    from tests.gpu_emulated.graphs import Capture, CUDAGraph

    Capture.waits_since = staticmethod(lambda first: syncs(since(first)))  # type: ignore[assignment]
    Capture.position = staticmethod(position)  # type: ignore[assignment]

    class Stream(torch.Stream):
        """Remembers its name; the streams of all tests are told apart by it."""

        number = 0
        name: str

        def __new__(cls, device: Any = None, priority: int = 0, **_: Any) -> Stream:
            made = super().__new__(cls, stream_id=0, device_index=0, device_type=1)
            made.name = f"stream {Stream.number}"
            Stream.number += 1
            return made

        def wait_stream(self, other: Any) -> None:
            _record("wait", f"{self.name} for {other.name}")

        def wait_event(self, event: Any) -> None:
            _record("wait", f"{self.name} for an event of {event.stream}")

        def record_event(self, event: Any = None) -> Any:
            event = event or CudaEvent()
            event.record(self)
            return event

        def synchronize(self) -> None:
            _record("sync", "torch.cuda.Stream.synchronize")

        def query(self) -> bool:
            return True

    class CudaEvent:
        """Knows on which stream it was recorded."""

        stream = ""

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, stream: Any = None) -> None:
            self.stream = (stream or _current()).name

        def wait(self, stream: Any = None) -> None:
            _record("wait", f"{(stream or _current()).name} for an event of {self.stream}")

        def synchronize(self) -> None:
            _record("sync", "torch.cuda.Event.synchronize")

        def query(self) -> bool:
            return True

        def elapsed_time(self, other: Any) -> float:
            return 1.0

    @contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        before = _current()
        _streams.current = stream or before
        try:
            yield
        finally:
            _streams.current = before

    def waiting(name: str) -> Any:
        return lambda *_, **__: _record("sync", name)

    def record_stream(tensor: Any, stream: Any) -> None:
        _record("record_stream", f"{tuple(tensor.shape)} {stream.name}")

    def host_register(pointer: int, size: int, flags: int) -> int:
        library.emulated_device_pin(ctypes.c_void_p(pointer), ctypes.c_size_t(size))
        return 0

    def host_unregister(pointer: int) -> int:
        library.emulated_device_unpin(ctypes.c_void_p(pointer))
        return 0

    global _DEFAULT
    _DEFAULT = Stream()
    runtime = SimpleNamespace(cudaHostRegister=host_register, cudaHostUnregister=host_unregister)
    properties = SimpleNamespace(
        name=NAME,
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=140 * 2**30,
        gcnArchName="",
        # Inductor chooses blocks by these.
        warp_size=32,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=48 * 2**10,
        shared_memory_per_block_optin=227 * 2**10,
        shared_memory_per_multiprocessor=228 * 2**10,
    )
    functions: dict[str, Any] = {
        "Stream": Stream,
        "Event": CudaEvent,
        "stream": on_stream,
        "current_stream": lambda *_: _current(),
        "default_stream": lambda *_: _DEFAULT,
        "synchronize": waiting("torch.cuda.synchronize"),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: Capture.running,
        "CUDAGraph": CUDAGraph,
        "graph": Capture,
        "is_bf16_supported": lambda *_, **__: True,
        "_lazy_init": lambda: None,
        "cudart": lambda: runtime,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (2**30, 2**31),
        "memory_allocated": lambda *_: 1,
        "max_memory_allocated": lambda *_: 1,
        "reset_peak_memory_stats": lambda *_: None,
        "empty_cache": lambda: None,
        "manual_seed": lambda *_: None,
        "manual_seed_all": lambda *_: None,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    torch.Tensor.record_stream = record_stream  # type: ignore[method-assign]
    resize = torch.UntypedStorage.resize_

    def resize_storage(storage: Any, size: int) -> Any:
        """FSDP frees gathered weights in this way; here they stay."""
        return storage if storage.device.type == "cuda" else resize(storage, size)

    torch.UntypedStorage.resize_ = resize_storage  # type: ignore[method-assign]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.accelerator.is_available = lambda *_: True
    torch.accelerator.synchronize = waiting("torch.accelerator.synchronize")
    without_driver: dict[str, Any] = {
        "_cuda_getDevice": lambda: 0,
        "_cuda_setDevice": lambda _: None,
        "_cuda_exchangeDevice": lambda _: 0,
        "_cuda_maybeExchangeDevice": lambda _: 0,
        "_cuda_getDeviceCount": lambda: 1,
        "_cuda_getCurrentRawStream": lambda _: 0,
        "_cuda_isCurrentStreamCapturing": lambda: False,
        "_cuda_getCurrentStream": lambda _: (0, 0, 1),
        "_cuda_hasPrimaryContext": lambda _: True,
    }
    for name, function in without_driver.items():
        if not hasattr(torch._C, name):
            setattr(torch._C, name, function)


_callback: Any = None
_DEFAULT: Any = SimpleNamespace(name="")
