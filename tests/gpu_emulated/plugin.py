"""A pytest plugin that installs the emulated device before anything imports torch: `-p tests.gpu_emulated.plugin`."""

import os

from tests.gpu_emulated import device

os.environ["TRITON_INTERPRET"] = "1"  # Triton kernels run on the host, too

device.install()
