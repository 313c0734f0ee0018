"""Collects what the GPU check needs beside torch, for a machine without a network.

    python -m tests.gpu.bundle --out build/gpu --python 3.12 --cifar cifar10
    python -m tests.gpu.bundle --ray --out build/gpu-ray --python 3.12 --cifar cifar10     # for check.py --ray

OUT/site has the packages, unpacked for that version of Python; check.py puts it on the path. With --ray there is
OUT/site.tar.xz instead, which has Ray too; check.py unpacks it. OUT/cifar10 has some shards of CIFAR-10, if a folder of
them is given. The whole stays below 60 MiB.

What Ray does not need for training is left out: its dashboard's pages, its Java and C++ parts, RLlib, tests, pyarrow's
headers and servers, and the symbol tables of native code.
"""

from __future__ import annotations

import argparse
import compileall
import lzma
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "annotated-types", "braceexpand", "markdown-it-py", "mdurl", "packaging", "pillow", "psutil",
    "pydantic", "pydantic_core", "Pygments", "PyYAML", "rich", "safetensors", "simplejpeg", "torchao",
    "typing-inspection", "typing_extensions", "webdataset", "xxhash",
)  # fmt: skip
"""All that the parts of the check import, beside torch and numpy."""
RAY_PACKAGES = (
    "attrs", "certifi", "charset-normalizer", "click", "filelock", "fsspec", "idna", "jsonschema",
    "jsonschema-specifications", "msgpack", "pandas", "protobuf", "pyarrow", "python-dateutil", "ray", "referencing",
    "requests", "rpds-py", "six", "urllib3",
)  # fmt: skip
"""What `--ray` adds: Ray, and what Ray Train imports."""
_UNUSED = ("PIL/_avif*", "pillow.libs/libavif*", "torchao/*.so")  # torchao trains in float8 without its own kernels
_UNUSED_OF_RAY = (
    "**/tests", "pandas/tests", "pyarrow/include", "pyarrow/includes", "pyarrow/src", "pyarrow/*.pxi", "pyarrow/*.pyx",
    "pyarrow/_flight*", "pyarrow/_orc*", "pyarrow/_substrait*", "pyarrow/libarrow_flight*", "pyarrow/*gandiva*",
    "ray/cpp", "ray/dashboard/client", "ray/jars", "ray/llm", "ray/rllib", "ray/serve", "ray/train/examples",
    "ray/tune/examples", "ray/core/libjemalloc.so",
)  # fmt: skip
_NATIVE = ("**/*.so", "**/*.so.*", "ray/core/src/ray/gcs/gcs_server", "ray/core/src/ray/raylet/raylet")
_XZ = 9 | lzma.PRESET_EXTREME
_LIMIT = 60 * 2**20
_SHARDS, _SHARDS_WITH_RAY = {"train": 6, "test": 1}, {"train": 3}  # of about 1,000 images


def pins(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Packages in the versions of constraints.txt."""
    known = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w.-]+==", line)
    )
    return [f"{name}=={known[name]}" for name in packages]


def collect_packages(site: Path, python: str, packages: Sequence[str] = PACKAGES) -> None:
    """Download wheels for a version of Python on x86-64 Linux, and unpack what is needed of them."""
    wheels = site.with_name("wheels")
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("2014", "_2_17", "_2_24", "_2_28", "_2_34")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={python}", *platforms, "-d", wheels.as_posix()]
    subprocess.run([*command, *pins(packages)], check=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)
    remove(site, _UNUSED)


def remove(site: Path, patterns: Sequence[str]) -> None:
    """Remove files and folders from the packages."""
    for found in [path for pattern in patterns for path in site.glob(pattern)]:
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)


def compress(site: Path) -> None:
    """Replace a folder of packages with one compressed file, without the symbol tables of native code."""
    for native in {path for pattern in _NATIVE for path in site.glob(pattern) if path.is_file()}:
        native.chmod(0o755)  # zip files lose the permission to run
        subprocess.run(["strip", "--strip-unneeded", native.as_posix()], check=True)
    with (
        lzma.open(site.with_suffix(".tar.xz"), "wb", preset=_XZ) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        tar.add(site, ".")
    shutil.rmtree(site)


def site_of(bundle: Path, work: Path) -> Path:
    """Folder of a bundle's packages. A compressed one is unpacked into a folder."""
    packed = bundle / "site.tar.xz"
    if not packed.exists():
        return bundle / "site"
    with tarfile.open(packed) as archive:
        archive.extractall(work / "site", filter="data")
    compileall.compile_dir(work / "site", quiet=2, workers=0)  # Ray waits for its processes to start
    return work / "site"


def collect_cifar(source: Path, target: Path, shards: dict[str, int]) -> None:
    """Copy some shards of CIFAR-10 (`train-*.tar`, `test-*.tar`), and index them."""
    from crate_ray.data.prepare.indexing import index_existing
    from crate_ray.storage.local import LocalStorage

    for part, count in shards.items():
        (target / part).mkdir(parents=True)
        for shard in sorted(source.glob(f"{part}-*.tar"))[:count]:
            shutil.copyfile(shard, target / part / shard.name)
        index_existing(LocalStorage(target / part))


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect everything, and fail if it is too large to carry."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bundle", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder to write; it is replaced")
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine")
    parser.add_argument("--cifar", type=Path, help="shards of CIFAR-10: a folder with train-*.tar and test-*.tar")
    parser.add_argument("--ray", action="store_true", help="with Ray, for check.py --ray")
    given = parser.parse_args(arguments)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    site = given.out / "site"
    collect_packages(site, given.python, [*PACKAGES, *RAY_PACKAGES] if given.ray else PACKAGES)
    if given.ray:
        remove(site, _UNUSED_OF_RAY)
        compress(site)
    if given.cifar:
        collect_cifar(given.cifar, given.out / "cifar10", _SHARDS_WITH_RAY if given.ray else _SHARDS)
    size = sum(file.stat().st_size for file in given.out.rglob("*") if file.is_file())
    print(f"{given.out}: {size / 2**20:.1f} MiB")
    if size > _LIMIT:
        raise SystemExit(f"more than {_LIMIT / 2**20:.0f} MiB; give less of CIFAR-10")


if __name__ == "__main__":
    main()
