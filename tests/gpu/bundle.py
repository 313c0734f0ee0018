"""Collects what the GPU check needs beside torch, for a machine without a network.

    python -m tests.gpu.bundle --out build/gpu --python 3.12 --cifar cifar10

OUT/site has the packages, unpacked for that version of Python; check.py puts it on the path. OUT/cifar10 has some
shards of CIFAR-10, if a folder of them is given. The whole stays below 60 MiB.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "annotated-types", "braceexpand", "markdown-it-py", "mdurl", "packaging", "pillow", "psutil",
    "pydantic", "pydantic_core", "Pygments", "PyYAML", "rich", "safetensors", "simplejpeg", "typing-inspection",
    "typing_extensions", "webdataset", "xxhash",
)  # fmt: skip
"""All that the parts of the check import, beside torch and numpy."""
_LIMIT = 60 * 2**20
_TRAIN_SHARDS, _TEST_SHARDS = 6, 1  # of about 1,000 images


def pins() -> list[str]:
    """The packages in the versions of constraints.txt."""
    known = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w.-]+==", line)
    )
    return [f"{name}=={known[name]}" for name in PACKAGES]


def collect_packages(site: Path, python: str) -> None:
    """Download wheels for a version of Python on x86-64 Linux, and unpack them."""
    wheels = site.with_name("wheels")
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("2014", "_2_17", "_2_24", "_2_28", "_2_34")]
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", f"--python-version={python}", *platforms, "-d", wheels.as_posix()]
    subprocess.run([*command, *pins()], check=True)
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    shutil.rmtree(wheels)
    for unused in [*site.glob("pillow.libs/libavif*"), *site.glob("PIL/_avif*")]:
        unused.unlink()


def collect_cifar(source: Path, target: Path) -> None:
    """Copy some shards of CIFAR-10 (`train-*.tar`, `test-*.tar`), and index them."""
    from crate_ray.data.prepare.indexing import index_existing
    from crate_ray.storage.local import LocalStorage

    for part, count in (("train", _TRAIN_SHARDS), ("test", _TEST_SHARDS)):
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
    given = parser.parse_args(arguments)
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    collect_packages(given.out / "site", given.python)
    if given.cifar:
        collect_cifar(given.cifar, given.out / "cifar10")
    size = sum(file.stat().st_size for file in given.out.rglob("*") if file.is_file())
    print(f"{given.out}: {size / 2**20:.1f} MiB")
    if size > _LIMIT:
        raise SystemExit(f"more than {_LIMIT / 2**20:.0f} MiB; give less of CIFAR-10")


if __name__ == "__main__":
    main()
