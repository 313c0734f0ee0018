"""The driver of `crate-ray serve`: starts Ray Serve, follows the alias of the model, and drains after SIGTERM."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import socket
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from crate_ray.config import ServeConfig
from crate_ray.errors import UserError
from crate_ray.models.exported import DESCRIPTION_FILE, WEIGHTS_FILE, ModelDescription, load_any
from crate_ray.progress import error_console
from crate_ray.ray_cluster import cluster_nodes, start_ray
from crate_ray.runs.mlflow_lookup import version_of_alias
from crate_ray.runs.references import fetch
from crate_ray.server.shelf import Shelf, Version
from crate_ray.training.signals import StopRequest, stop_signals

APPLICATION = "crate-ray"
_ALIAS = re.compile(r"models:/([^/@]+)@([^/@]+)")
_SHORTEST_TOKEN = 16
_FOR_A_LOCAL_RAY = {
    "RAY_worker_niceness": "0",  # by default, Ray's processes yield to all others
    "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads do not spin while the proxy needs their core
}
_LOOK_SECONDS = 0.2


class Source:
    """Finds the model behind a reference, and again when its alias has moved."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config
        self._alias = _ALIAS.fullmatch(config.model)
        self.moves = self._alias is not None
        """Whether the reference may stand for another version later."""

    def version(self) -> str:
        """The version of the registered model that has the alias, or else the reference."""
        if self._alias is None:
            return self._config.model
        return version_of_alias(self._alias[1], self._alias[2], self._config.tracking)

    def fetch(self, version: str) -> tuple[ModelDescription, bytes, bytes]:
        """Description of a version, and the bytes of its two files, which have been loaded once to check them."""
        reference = version if self._alias is None else f"models:/{self._alias[1]}/{version}"
        with tempfile.TemporaryDirectory(prefix="crate-ray-") as temporary:
            folder = Path(temporary)
            description = fetch(reference, folder, self._config.tracking, self._config.s3)
            load_any(folder)
            return description, (folder / DESCRIPTION_FILE).read_bytes(), (folder / WEIGHTS_FILE).read_bytes()


def serve_model(config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish the requests in progress.

    Raises:
        UserError: there is no such model, Ray Serve is not installed, or the port, the token or the cluster cannot be
            used.
    """
    _check_installed()
    token = _token_digest(config.token_env)
    source = Source(config)
    version = source.version()
    description, *files = source.fetch(version)
    _check_port(config.host, config.port)
    for name, value in _FOR_A_LOCAL_RAY.items():
        os.environ.setdefault(name, value)
    start_ray()
    # Imported here because they need the packages of Ray Serve.
    import ray
    from ray import serve

    if serve.status().proxies:
        raise UserError("this Ray cluster runs Ray Serve already; run `serve shutdown`, or unset RAY_ADDRESS")
    shelf = ray.remote(num_cpus=0, max_concurrency=1000)(Shelf).remote()
    _put(shelf, version, files)
    with stop_signals() as stop:
        try:
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            log = {"log_level": "WARNING", "enable_access_log": False}
            address = {"host": config.host, "port": config.port, "request_timeout_s": config.request_seconds}
            serve.start("HeadOnly", address, logging_config=log)
            serve.run(_application(config, shelf, token), name=APPLICATION, logging_config=log)
            what = f"{config.model} (version {version})" if source.moves else config.model
            print(
                f"serving    {what}, step {description.step:,}, on http://{_shown(config.host)}:{config.port}/invocations",
                flush=True,
            )
            _follow(config, source, shelf, version, stop)
            print("stopping   requests in progress are finished", flush=True)
            serve.delete(APPLICATION)
        finally:
            with redirect_stdout(io.StringIO()):  # Ray prints that the controller, which ends itself, is dead
                serve.shutdown()
                ray.shutdown()


def _follow(config: ServeConfig, source: Source, shelf: Any, version: str, stop: StopRequest) -> None:
    """Give the replicas each version that gets the alias, until the process is asked to stop."""
    last_problem, at = "", time.monotonic()
    while not stop.signal:
        time.sleep(_LOOK_SECONDS)
        if not source.moves or time.monotonic() - at < config.poll_seconds:
            continue
        try:
            if (newest := source.version()) != version:
                description, *files = source.fetch(newest)
                _put(shelf, newest, files)
                version = newest
                print(f"now        version {version}, step {description.step:,}", flush=True)
            last_problem = ""
        except UserError as error:
            if str(error) != last_problem:
                error_console().print(f"version {version} stays: {error}", soft_wrap=True)
            last_problem = str(error)
        at = time.monotonic()


def _application(config: ServeConfig, shelf: Any, token: str | None) -> Any:
    from ray import serve

    from crate_ray.server.replica import Replica

    cpus, gpu = _resources(config)
    settings = config.model_dump(include={"batch_size", "batch_wait_seconds", "max_body_bytes", "max_images"})
    deployment = serve.deployment(
        Replica,
        name="model",
        num_replicas=config.replicas,
        max_ongoing_requests=max(64, 4 * config.batch_size),
        max_queued_requests=config.max_queued_requests,
        graceful_shutdown_timeout_s=config.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        user_config={},
        ray_actor_options={"num_cpus": cpus, "num_gpus": int(gpu)},
    )
    return deployment.bind(shelf, token, settings | {"cpus": cpus, "gpu": gpu})


def _resources(config: ServeConfig) -> tuple[int, bool]:
    """CPUs of each replica, and whether it has a GPU."""
    nodes = cluster_nodes()
    gpus = sum(node.gpus for node in nodes)
    gpu = gpus >= config.replicas if config.gpu is None else config.gpu
    if gpu and gpus < config.replicas:
        raise UserError(
            f"{config.replicas} replicas need a GPU each, the cluster has {gpus}; lower replicas, or set gpu false"
        )
    cpus = sum(node.cpus for node in nodes if node.gpus or not gpu)
    if cpus < config.replicas:
        raise UserError(f"{config.replicas} replicas need a CPU each, the cluster has {cpus}; lower replicas")
    return min(cpus // config.replicas, max(node.cpus for node in nodes)), gpu


def _put(shelf: Any, version: str, files: list[bytes]) -> None:
    import ray

    description, weights = files
    ray.get(shelf.put.remote(Version(version, description, [ray.put(weights)])))


def _check_installed() -> None:
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"Ray Serve cannot be imported ({str(error).splitlines()[0]}); pip install 'crate-ray[serve]'"
        ) from None


def _token_digest(name: str | None) -> str | None:
    """SHA-256 of the token in an environment variable, which Ray's processes and records then never hold."""
    if name is None:
        return None
    token = os.environ.pop(name, "").strip()
    if len(token) < _SHORTEST_TOKEN:
        raise UserError(
            f"the environment variable {name} of --token-env has {len(token)} characters; put a token of at least "
            f"{_SHORTEST_TOKEN} into it, such as that of `openssl rand -hex 32`"
        )
    return hashlib.sha256(token.encode()).hexdigest()


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"cannot listen on {_shown(host)}:{port} ({error.strerror}); give another --host or --port"
        ) from None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
