"""What a process prints never ends it: readers that leave, closed and full streams, letters that an encoding lacks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from crate_ray.output import shortened

ROOT = Path(__file__).parents[2]
JOB = """
import sys
from pathlib import Path
from crate_ray.cli import reported
from crate_ray.errors import UserError

with reported():
    from rich.table import Table
    from crate_ray.progress import CountDisplay, console
    with CountDisplay("packing größe", 3) as display:
        display.say("größe 漢字 \\udcff")
    table = Table(title="Größe ├─ 漢字")
    table.add_column("name \\udcff")
    for row in range(3000):
        table.add_row(f"größe-{row}")
    console().print(table)
    for row in range(3000):
        print(f"größe 漢字 {row}")
    print("end")
    sys.stdout.flush()
    print("größe", file=sys.stderr)
    Path("done").touch()
    if sys.argv[1:]:
        raise UserError("größe " * int(sys.argv[1]))
"""


def run(folder: Path, redirection: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The job in a shell; its exit code is in the file `code`."""
    (folder / "job.py").write_text(JOB, encoding="utf-8")
    command = f"{{ {sys.executable} job.py {' '.join(arguments)}; echo $? >code; }} {redirection}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        ["bash", "-c", command], cwd=folder, capture_output=True, timeout=60,
        env={**kept, "PYTHONPATH": str(ROOT), "TERM": "dumb", **environment},
    )  # fmt: skip


REDIRECTIONS = [
    "| head -1", "2>&1 | head -1", "| true", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", ">/dev/full 2>&1",
]  # fmt: skip


@pytest.mark.parametrize("redirection", REDIRECTIONS)
def test_a_job_ends_well_wherever_its_output_goes(tmp_path: Path, redirection: str) -> None:
    shown = run(tmp_path, redirection, "5")
    assert (tmp_path / "done").exists() and (tmp_path / "code").read_text() == "2\n"
    assert b"Traceback" not in shown.stderr and b"Exception" not in shown.stderr
    assert "2>" in redirection or "error: größe größe" in shown.stderr.decode()
    lost = shown.stderr.count(b"warning: the rest of standard output was lost (No space left on device)")
    assert lost == (redirection == ">/dev/full")


@pytest.mark.parametrize(
    ("environment", "letters"),
    [
        ({}, "größe 漢字 2999"),
        ({"LC_ALL": "C"}, "größe 漢字 2999"),
        ({"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "größe 漢字 2999"),
        ({"PYTHONIOENCODING": "ascii"}, "gr\\xf6\\xdfe \\u6f22\\u5b57 2999"),
        ({"PYTHONIOENCODING": "ascii:strict"}, "gr\\xf6\\xdfe \\u6f22\\u5b57 2999"),
        ({"PYTHONIOENCODING": "latin-1"}, "größe \\u6f22\\u5b57 2999"),
    ],
)
def test_output_is_utf_8_or_what_was_asked_for(tmp_path: Path, environment: dict[str, str], letters: str) -> None:
    shown = run(tmp_path, "", **environment)
    assert (tmp_path / "code").read_text() == "0\n" and b"Traceback" not in shown.stderr
    encoding = environment.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    assert shown.stdout.decode(encoding).splitlines()[-2:] == [letters, "end"]


def test_a_pipe_that_does_not_block_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB, encoding="utf-8")
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    job = subprocess.Popen(
        [sys.executable, "job.py"], cwd=tmp_path, stdout=writing, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        lines = pipe.read().decode().splitlines()
    assert job.wait(60) == 0
    assert lines[-1] == "end" and sum(line.startswith("größe 漢字") for line in lines) == 3000


def test_a_stream_that_a_library_closed_is_no_error(tmp_path: Path) -> None:
    code = "import sys; from crate_ray.output import guard_output; guard_output(); sys.stdout._stream.close()\n"
    code += "print('x'); sys.stdout.flush(); print('é', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.decode()) == (0, "é\n")


def test_a_very_long_error_is_shortened(tmp_path: Path) -> None:
    shown = run(tmp_path, "", "1000000").stderr.decode()
    assert (tmp_path / "code").read_text() == "2\n" and len(shown) < 5000
    assert "error: größe" in shown and " … (5,996,000 characters left out) … " in shown
    assert shortened("x" * 4000) == "x" * 4000
