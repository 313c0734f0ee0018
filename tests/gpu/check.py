"""Everything to check and measure on a GPU, within a given time, on a machine with nothing but torch.

    python -m tests.gpu.check --minutes 9 --out results            # make gpu-check
    python -m tests.gpu.check --dry-run --out results              # rehearse on the emulated device, without a GPU
    python -m tests.gpu.check --ray --minutes 6 --out results-ray  # the second call: a run on Ray, SIGTERM, resume

Each part runs in a process of its own with a time limit, and writes its results to OUT/<part>.json. At the end there is
one table with a verdict for each goal, OUT/check.md, and all results in OUT/check.json, from which `python -m
tests.gpu.report` makes the section in docs/performance.md. The machine needs torch with CUDA, and the packages that
`python -m tests.gpu.bundle` collects for it. With --ray they are others, and a rehearsal uses the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.gpu.bundle import site_of

ROOT = Path(__file__).parents[2]
Results = dict[str, Any]

SECONDS = {
    "machine": 20, "ceilings": 30, "parity": 40, "no_waiting": 40, "not_finite": 20, "graphed": 60, "ddp": 40,
    "checkpoint": 40, "compiled": 150, "loop": 90, "train_tiny": 90, "train_small": 90, "train_base": 120,
    "train_large": 150, "base_bf16_tokens": 60, "base_float8": 80, "attention": 40, "mssa": 60, "small_batches": 120,
    "profile": 90, "decode": 30, "base_autotuned": 180, "cifar": 120,
}  # fmt: skip
"""Time limit of each part, in the order in which they run."""
RAY_SECONDS = {"ray_whole": 120, "ray_stopped": 90, "ray_resumed": 150, "ray_usual": 150}
"""The same for the parts of the call with --ray."""
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
        "base_bf16_tokens",
        lambda r: r["bf16 tokens"].get("mfu", 0.0),
        lambda v: v >= 0.43,
    ),
    Goal("pixels decoded on the device", "decode", lambda r: r["mean_difference"], lambda v: v < 2),
    Goal(
        "CIFAR-10: pretraining beats the untrained encoder",
        "cifar",
        lambda r: r["trained"] - r["untrained"],
        lambda v: v > 0,
    ),
    Goal(
        "on Ray: a run trains to its last step",
        "ray_whole",
        lambda r: r["finished"] and r["last_loss"] < r["first_loss"],
        bool,
    ),
    Goal(
        "on Ray: SIGTERM saves a checkpoint and ends the driver with 143",
        "ray_stopped",
        lambda r: r["exit_code"] == 143 and r["asked_at"] <= r["saved_at"] < r["steps"],
        bool,
    ),
    Goal(
        "on Ray: the same command resumes at the saved step and finishes",
        "ray_resumed",
        lambda r: r["resumed_at"] == r["saved_at"] > 0 and r["finished"],
        bool,
    ),
    Goal(
        "on Ray: the resumed run has the weights of the whole run, bit by bit (deterministic algorithms)",
        "ray_resumed",
        lambda r: r["difference"],
        lambda v: v == 0,
    ),
    Goal(
        "on Ray: losses fall with the usual settings",
        "ray_usual",
        lambda r: r["last_loss"] / r["first_loss"],
        lambda v: v < 1,
    ),
)


def run_part(name: str, out: Path, seconds: float, env: dict[str, str]) -> Results:
    """Run one part in a process of its own; its results, or the reason why there are none."""
    command = [sys.executable, "-m", f"tests.gpu.{'on_ray' if name in RAY_SECONDS else 'parts'}", name]
    began = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            found: Results = {"failed": f"took longer than {seconds:.0f} s"}
        else:
            lines = printed.strip().splitlines()
            if process.returncode == 0 and lines:
                found = json.loads(lines[-1])
            else:
                said = (out / f"{name}.log").read_text().strip().splitlines()
                found = {"failed": said[-1] if said else f"exit code {process.returncode}"}
        finally:
            if process.poll() is None:  # end it with the processes that it has started
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    found["seconds"] = round(time.monotonic() - began, 1)
    (out / f"{name}.json").write_text(json.dumps(found, indent=1))
    return found


def verdicts(results: dict[str, Results]) -> list[tuple[str, str, str]]:
    """Goal, value and verdict of each goal of the calls that the results are from."""
    calls = [parts for parts in (SECONDS, RAY_SECONDS) if parts.keys() & results.keys() - {"machine"}]
    rows = []
    for goal in GOALS:
        if not any(goal.part in parts for parts in calls):
            continue
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
        lines = ["Rehearsal without a GPU: speeds and MFU mean nothing.", ""]
    lines += ["| goal | value | |", "| --- | --- | --- |"]
    lines += [f"| {goal} | {value} | {verdict} |" for goal, value, verdict in verdicts(results)]
    speeds = ["", "| model | images/s | MFU | memory | start |", "| --- | --- | --- | --- | --- |"]
    for name, found in results.items():
        if not name.startswith(("train_", "base_", "small_batches")):
            continue
        for model, figures in found.items():
            if isinstance(figures, dict) and "images_per_second" in figures:
                memory = (figures["peak_memory_bytes"] or 0) / 2**30
                mfu = f"{figures['mfu']:.1%}" if "mfu" in figures else ""
                size = "" if name == "small_batches" else name.removeprefix("train_").partition("_")[0]
                speeds.append(
                    f"| {size} {model} | {figures['images_per_second']:,.0f} | {mfu} | {memory:.1f} GiB | "
                    f"{figures['start_seconds']:.0f} s |"
                )
    lines += speeds if len(speeds) > 3 else []
    lines += ["", "| part | seconds | |", "| --- | --- | --- |"]
    for name, found in results.items():
        lines.append(f"| {name} | {found['seconds']} | {found.get('failed', found.get('skipped', ''))} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts that the time allows; 0 if none has failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.check", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--parts", nargs="*", choices=[*SECONDS, *RAY_SECONDS], help="parts to run")
    parser.add_argument("--ray", action="store_true", help="run the parts that need Ray instead of the others")
    parser.add_argument("--bundle", type=Path, help="folder that tests.gpu.bundle has made")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the emulated device")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="gpu-", ignore_cleanup_errors=True) as work:
        return _check(given, Path(work))


def _check(given: argparse.Namespace, work: Path) -> int:
    given.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * given.minutes
    seconds = {"machine": SECONDS["machine"]} | RAY_SECONDS if given.ray else SECONDS
    rehearsal_skips = ("machine",) if given.ray else ("train_small", "train_base", "train_large")
    env = {**os.environ, "OUT": given.out.resolve().as_posix(), "CRATE_RAY_GPU_WORK": work.as_posix()}
    if given.dry_run:
        env["CRATE_RAY_GPU_CHECK"] = "dry"
    if given.bundle:
        site = site_of(given.bundle, work).resolve().as_posix()
        env["PYTHONPATH"] = os.pathsep.join([site, env.get("PYTHONPATH", "")])
        env["CRATE_RAY_GPU_CIFAR"] = (given.bundle / "cifar10").resolve().as_posix()
    results: dict[str, Results] = {}
    for name in given.parts or seconds:
        left = deadline - time.monotonic()
        if given.dry_run and name in rehearsal_skips:
            continue
        if left < 5:
            results[name] = {"failed": "no time was left", "seconds": 0.0}
            continue
        env["CRATE_RAY_GPU_SECONDS"] = str(max(10.0, (left - _LEFT_FOR_CIFAR) * 0.6))
        limit = left if name == "cifar" else min((SECONDS | RAY_SECONDS)[name] * (1 + given.dry_run), left)
        results[name] = run_part(name, given.out, limit, env)
        print(f"{name}: {results[name].get('failed', 'done')} ({results[name]['seconds']} s)", flush=True)
    command = f"python -m tests.gpu.check{' --ray' * given.ray} --minutes {given.minutes:g}"
    measured = {"command": command, "dry_run": given.dry_run, "parts": results}
    (given.out / "check.json").write_text(json.dumps(measured, indent=1))
    text = report(results, dry=given.dry_run)
    (given.out / "check.md").write_text(text)
    print(text)
    return int(any("failed" in found for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
