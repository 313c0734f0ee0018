"""A real S3 server for tests: the Ceph RADOS gateway of cluster/ceph-rgw.sh, on ports and in a folder of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph-authtool")


@dataclass(frozen=True)
class S3Gateway:
    """A gateway that is up."""

    folder: Path
    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        """The keys, for the AWS chain."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def new_keys(self) -> tuple[str, str]:
        """Another access key and secret key of the same user."""
        made = subprocess.run(
            ["radosgw-admin", "key", "create", "--uid=crate-ray", "--key-type=s3", "--gen-access-key", "--gen-secret"],
            env={**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")},
            cwd=self.folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
        keys = {entry["access_key"]: entry["secret_key"] for entry in json.loads(made.stdout)["keys"]}
        return next(pair for pair in keys.items() if pair[0] != self.access_key)


@contextmanager
def running_gateway() -> Iterator[S3Gateway]:
    """A gateway until the block ends; skips where Debian packages are missing, except in CI."""
    if not all(map(shutil.which, _PROGRAMS)):
        reason = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd ceph-common"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="crate-ray-s3-"))
    port = _free_ports()
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [ROOT / "cluster/ceph-rgw.sh", folder, str(port)], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    try:
        keys = folder / "s3.json"
        end = time.monotonic() + 180
        while not keys.exists():
            if process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"the S3 gateway does not come up:\n{(folder / 'log.txt').read_text()[-3000:]}")
            time.sleep(0.1)
        key = json.loads(keys.read_text())["keys"][0]
        yield S3Gateway(folder, f"http://127.0.0.1:{port}", key["access_key"], key["secret_key"])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports() -> int:
    """First of two free ports in a row, below the range of ephemeral ports, so that no connection takes one."""
    for port in range(20000 + os.getpid() % 6000 * 2, 32000, 2):
        with socket.socket() as gateway, socket.socket() as monitor:
            try:
                gateway.bind(("127.0.0.1", port))
                monitor.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError("there are no free ports")
