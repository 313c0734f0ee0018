"""The commands of the guides, one after the other as they stand. Only data, models and trainings are small."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import boto3
import numpy as np
import pytest
from PIL import Image

from tests.jobs import ROOT, RayCluster, environment
from tests.s3_gateway import S3Gateway

pytestmark = pytest.mark.ray

GUIDES = ("data", "training", "tracking", "evaluation", "sweeps", "operations")
"""In this order, since some commands use what others have made."""
MODEL = ["--model.image-size", "32", "--model.patch-size", "8", "--model.dim", "32", "--model.depth", "1",
         "--model.num-subspaces", "2"]  # fmt: skip
STEPS = ["--training.steps", "4", "--training.batch-size", "8", "--scaling.workers", "1"]
SMALL = {
    "pretrain": [*MODEL, *STEPS],
    "finetune": STEPS,
    "compare": ["--settings", '{"training.steps": 4}', "--seeds", "0", "--baselines", "false"],
    "register promote": ["--force", "true", "--reason", "pictures of noise"],
    "sweep": ["--settings", '{"training.steps": 4, "training.validate_every": 2}', "--trials", "1",
              "--grace-steps", "null"],
}  # fmt: skip


def commands(guide: str) -> list[list[str]]:
    """Words of the commands in a guide's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / f"docs/{guide}.md").read_text(), re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("crate-ray ")]


def picture(random: np.random.Generator) -> bytes:
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (40, 48, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_world(folder: Path, gateway: S3Gateway) -> None:
    """What the guides take to be there: photos, labelled ones, ones with masks, and shards in buckets."""
    random = np.random.default_rng(0)
    (folder / "photos").mkdir()
    for i in range(60):
        (folder / "photos" / f"{i}.png").write_bytes(picture(random))
    for part in ("labelled", "held-out"):
        for i in range(40):
            target = folder / f"{part}-photos" / f"class-{i % 2}"
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{i}.png").write_bytes(picture(random))
            copy = folder / "cifar10" / ("train" if part == "labelled" else "test") / f"class-{i % 2}" / f"{i}.png"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target / f"{i}.png", copy)
    (folder / "spectrograms").mkdir()
    for i in range(40):
        np.save(folder / "spectrograms" / f"{i}.npy", random.normal(size=(32, 32)).astype(np.float32))
    (folder / "people-photos").mkdir()
    for i in range(12):
        (folder / "people-photos" / f"{i}.png").write_bytes(picture(random))
        mask = np.zeros((40, 48), np.uint8)
        mask[10:30, 10 + i : 30 + i] = 255
        Image.fromarray(mask).save(folder / "people-photos" / f"{i}.mask.png")
    s3 = boto3.client("s3", endpoint_url=gateway.endpoint, region_name="us-east-1")
    for bucket in ("bucket", "data", "runs"):
        s3.create_bucket(Bucket=bucket)
    for number in range(50):
        shard = io.BytesIO()
        with tarfile.open(fileobj=shard, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            content = picture(random)
            member = tarfile.TarInfo(f"{number:05d}.png")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for key in (f"cifar10/train-{number:05d}.tar", *([f"shards/{number}.tar"] if number < 3 else [])):
            s3.put_object(Bucket="bucket", Key=key, Body=shard.getvalue())
    (folder / "jobs").mkdir()
    shutil.copytree(ROOT / "jobs/configs", folder / "jobs/configs")


@pytest.mark.daily
@pytest.mark.timeout(1800)
def test_the_commands_of_the_guides_work(
    small_ray: RayCluster, s3_gateway: S3Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_gateway.environment.items():
        monkeypatch.setenv(name, value)
    make_world(tmp_path, s3_gateway)
    small_ray.credentials.write_text(
        "[default]\n"
        f"aws_access_key_id = {s3_gateway.environment['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {s3_gateway.environment['AWS_SECRET_ACCESS_KEY']}\n"
        f"endpoint_url = {s3_gateway.endpoint}\n"
    )
    env = environment(tmp_path) | s3_gateway.environment
    env |= {"RAY_ADDRESS": small_ray.address, "PYTHONPATH": str(ROOT), "AWS_ENDPOINT_URL": s3_gateway.endpoint}

    failed: list[str] = []

    def run(*words: str) -> None:
        command = [sys.executable, "-m", "crate_ray", *words]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            failed.append(f"{shlex.join(words)}\n{done.stdout}{done.stderr}")

    for part in ("labelled", "held-out", "people"):
        run("prepare", "--source", f"{part}-photos", "--output", f"data/{part}")
    for name in ("mine", "drawings"):
        run("prepare", "--source", "photos", "--output", f"s3://data/{name}")
    for output in ("s3://data/photos", "data/more"):
        run("prepare", "--source", "photos", "--output", output)
    run("pretrain", "--data", "photos", "--name", "mine", *SMALL["pretrain"])

    done: set[str] = set()
    for guide in GUIDES:
        for number, words in enumerate(commands(guide)):
            name = words[0]
            if shlex.join(words) in done or words[-1] in ("s3://data/photos", "benchmark"):
                continue  # packed before, since other guides need it earlier
            if name == "serve":
                continue  # it does not end; test_serve.py runs it
            if "onnx" in words and find_spec("onnxscript") is None:
                continue  # an optional package
            done.add(shlex.join(words))
            if "--training.epochs" in words:
                at = words.index("--training.epochs")
                words = [*words[:at], *words[at + 2 :]]
            if "--model.preset" in words:  # the model is a smaller one here
                at = words.index("--model.preset")
                words = [*words[:at], *words[at + 4 :]]
            words = [word.replace("http://mlflow:5000", f"sqlite:///{tmp_path}/mlflow.db") for word in words]
            named = name in ("pretrain", "finetune") and "--name" not in words
            run(
                *words,
                *SMALL.get(name, SMALL.get(shlex.join(words[:2]), [])),
                *(["--name", f"{guide}-{number}"] if named else []),
            )
    assert not failed, "\n".join(failed)
    assert len(done) >= 22
