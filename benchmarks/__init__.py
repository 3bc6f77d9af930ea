"""Scripts that measure; each is a command of its own, ``python -m benchmarks.NAME``."""

from benchmarks.torchvision_operators import define

define()  # before anything imports transformers, which imports torchvision where it is installed
