"""Everything to check and measure on a GPU, within a given time, on a machine with nothing but torch.

    python -m tests.gpu.check --minutes 9 --out results            # make gpu-check
    python -m tests.gpu.check --dry-run --out results              # rehearse on the emulated device, without a GPU

Each part runs in a process of its own with a time limit, and writes its results to OUT/<part>.json. At the end there is
one table with a verdict for each goal, OUT/check.md, and all results in OUT/check.json. The machine needs torch with
CUDA, and the packages that `python -m tests.gpu.bundle` collects for it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
Results = dict[str, Any]

SECONDS = {
    "machine": 20, "ceilings": 30, "parity": 40, "no_waiting": 40, "not_finite": 20, "graphed": 60, "ddp": 40,
    "checkpoint": 40, "compiled": 150, "loop": 90, "train_tiny": 90, "train_small": 90, "train_base": 120,
    "train_large": 180, "attention": 40, "mssa": 60, "small_batches": 120, "profile": 90, "decode": 30, "cifar": 120,
}  # fmt: skip
"""Time limit of each part, in the order in which they run."""
_LEFT_FOR_CIFAR = 15.0


class Goal(NamedTuple):
    """What a result has to be."""

    text: str
    part: str
    value: Callable[[Results], float | bool]
    reached: Callable[[Any], bool]


def _all(results: Results, value: Callable[[Any], float]) -> float:
    return max(value(entry) for entry in results.values())


GOALS = (
    Goal("float64 equals the plain form", "parity", lambda r: r["float64_gradients"], lambda v: v < 1e-10),
    Goal(
        "bf16 losses are near fp32",
        "parity",
        lambda r: max(v for k, v in r.items() if k[:4] == "bf16"),
        lambda v: v < 0.05,
    ),
    Goal("20 steps without waiting, all models", "no_waiting", lambda r: len(r), lambda v: v > 0),
    Goal("a step that is not finite is skipped", "not_finite", lambda r: r["unchanged"] and r["next_step_works"], bool),
    Goal("all models run in a CUDA graph", "graphed", lambda r: all(v["captured"] for v in r.values()), bool),
    Goal(
        "steps in a CUDA graph give the weights of plain steps",
        "graphed",
        lambda r: _all(r, lambda v: v["weights"]),
        lambda v: v < 1e-2,
    ),
    Goal("DDP over NCCL equals one process", "ddp", lambda r: r["difference"], lambda v: v < 1e-3),
    Goal("checkpoints restore bit by bit", "checkpoint", lambda r: r["bitwise"], bool),
    Goal("all models compile", "compiled", lambda r: all(v["compiled"] for v in r.values()), bool),
    Goal(
        "compiled gradients are near eager ones",
        "compiled",
        lambda r: _all(r, lambda v: v["gradients"]),
        lambda v: v < 0.05,
    ),
    Goal(
        "losses fall in the job's loop",
        "loop",
        lambda r: r["last"]["train/loss"] / r["first"]["train/loss"],
        lambda v: v < 1,
    ),
    Goal("MFU of base, compiled", "train_base", lambda r: r["crate_mae compiled"].get("mfu", 0.0), lambda v: v >= 0.40),
    Goal(
        "MFU of large, compiled", "train_large", lambda r: r["crate_mae compiled"].get("mfu", 0.0), lambda v: v >= 0.40
    ),
    Goal(
        "MFU of base, compiled, bf16 tokens",
        "train_base",
        lambda r: r["crate_mae compiled, bf16 tokens"].get("mfu", 0.0),
        lambda v: v >= 0.43,
    ),
    Goal("pixels decoded on the device", "decode", lambda r: r["mean_difference"], lambda v: v < 2),
    Goal(
        "CIFAR-10: pretraining beats the untrained encoder",
        "cifar",
        lambda r: r["trained"] - r["untrained"],
        lambda v: v > 0,
    ),
)


def run_part(name: str, out: Path, seconds: float, env: dict[str, str]) -> Results:
    """Run one part in a process of its own; its results, or the reason why there are none."""
    command = [sys.executable, "-m", "tests.gpu.parts", name]
    began = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            found: Results = {"failed": f"took longer than {seconds:.0f} s"}
        else:
            lines = printed.strip().splitlines()
            if process.returncode == 0 and lines:
                found = json.loads(lines[-1])
            else:
                said = (out / f"{name}.log").read_text().strip().splitlines()
                found = {"failed": said[-1] if said else f"exit code {process.returncode}"}
    found["seconds"] = round(time.monotonic() - began, 1)
    (out / f"{name}.json").write_text(json.dumps(found, indent=1))
    return found


def verdicts(results: dict[str, Results]) -> list[tuple[str, str, str]]:
    """Goal, value and verdict of each goal."""
    rows = []
    for goal in GOALS:
        found = {key: value for key, value in results.get(goal.part, {}).items() if key != "seconds"}
        if "failed" in found or "skipped" in found or not found:
            reason = str(found.get("failed") or found.get("skipped") or "")
            verdict = "FAILED" if "failed" in found else "skipped" if found else "not run"
            rows.append((goal.text, reason[:90], verdict))
            continue
        value = goal.value(found)
        shown = str(value) if isinstance(value, bool | int) else f"{value:.3g}"
        rows.append((goal.text, shown, "reached" if goal.reached(value) else "MISSED"))
    return rows


def report(results: dict[str, Results], *, dry: bool) -> str:
    """The table, in Markdown."""
    machine = results.get("machine", {})
    lines = [f"{machine.get('device')}, torch {machine.get('torch')}, CUDA {machine.get('cuda')}", ""]
    if dry:
        lines = ["Rehearsal on an emulated device: speeds and MFU mean nothing.", ""]
    lines += ["| goal | value | |", "| --- | --- | --- |"]
    lines += [f"| {goal} | {value} | {verdict} |" for goal, value, verdict in verdicts(results)]
    lines += ["", "| model | images/s | MFU | memory | start |", "| --- | --- | --- | --- | --- |"]
    for name, found in results.items():
        if not name.startswith(("train_", "small_batches")):
            continue
        for model, figures in found.items():
            if isinstance(figures, dict) and "images_per_second" in figures:
                memory = (figures["peak_memory_bytes"] or 0) / 2**30
                mfu = f"{figures['mfu']:.1%}" if "mfu" in figures else ""
                size = name.removeprefix("train_").replace("small_batches", "")
                lines.append(
                    f"| {size} {model} | {figures['images_per_second']:,.0f} | {mfu} | {memory:.1f} GiB | "
                    f"{figures['start_seconds']:.0f} s |"
                )
    lines += ["", "| part | seconds | |", "| --- | --- | --- |"]
    for name, found in results.items():
        lines.append(f"| {name} | {found['seconds']} | {found.get('failed', found.get('skipped', ''))} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts that the time allows; 0 if none has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--parts", nargs="*", choices=SECONDS, default=list(SECONDS), help="parts to run")
    parser.add_argument("--bundle", type=Path, help="folder that tests.gpu.bundle has made")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the emulated device")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * given.minutes
    env = {**os.environ, "OUT": given.out.resolve().as_posix()}
    if given.dry_run:
        env["CRATE_RAY_GPU_CHECK"] = "dry"
    if given.bundle:
        env["PYTHONPATH"] = os.pathsep.join([(given.bundle / "site").resolve().as_posix(), env.get("PYTHONPATH", "")])
        env["CRATE_RAY_GPU_CIFAR"] = (given.bundle / "cifar10").resolve().as_posix()
    results: dict[str, Results] = {}
    for name in given.parts:
        left = deadline - time.monotonic()
        if given.dry_run and name in ("train_small", "train_base", "train_large"):
            continue
        if left < 5:
            results[name] = {"failed": "no time was left", "seconds": 0.0}
            continue
        env["CRATE_RAY_GPU_SECONDS"] = str(max(10.0, (left - _LEFT_FOR_CIFAR) * 0.6))
        results[name] = run_part(name, given.out, min(SECONDS[name] if name != "cifar" else left, left), env)
        print(f"{name}: {results[name].get('failed', 'done')} ({results[name]['seconds']} s)", flush=True)
    (given.out / "check.json").write_text(json.dumps(results, indent=1))
    text = report(results, dry=given.dry_run)
    (given.out / "check.md").write_text(text)
    print(text)
    return int(any("failed" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
