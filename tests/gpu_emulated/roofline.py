"""`crate-ray benchmark roofline` on the emulated device: python -m tests.gpu_emulated.roofline [--presets base]."""

from __future__ import annotations

import sys

from tests.gpu_emulated import device


def main() -> None:
    """Run the job with this command line."""
    device.install()
    from crate_ray.jobs.benchmark import run

    sys.argv = ["crate-ray benchmark", "roofline", *sys.argv[1:]]
    run()


if __name__ == "__main__":
    main()
