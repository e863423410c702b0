"""Versions and devices, for bug reports and for the records of measurements."""

import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata

PACKAGES = ("liger-trainer", "torch", "triton", "transformers", "accelerate", "trl", "peft", "datasets", "deepspeed")


def environment() -> dict[str, str | list[str] | None]:
    """The versions of ``PACKAGES``, CUDA and the driver, and the names of the GPUs.

    Initialises the first GPU if there is one.
    """
    import torch

    return {
        "python": sys.version.split()[0],
        **versions(PACKAGES),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "driver": nvidia_driver(),
    }


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of each package, or ``None`` if it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, or ``None`` if there is none."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None
