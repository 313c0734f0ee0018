"""A pytest plugin that installs the emulated device before anything imports torch: `-p tests.gpu_emulated.plugin`."""

from tests.gpu_emulated import device

device.install()
