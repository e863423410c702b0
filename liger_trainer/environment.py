"""Versions and devices, for bug reports and beside measured numbers."""

import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata

PACKAGES = ("liger-trainer", "torch", "triton", "transformers", "accelerate", "trl", "peft", "datasets", "deepspeed")


def environment() -> dict[str, str | list[str] | None]:
    """Versions of what matters and the names of the GPUs; starts the first GPU if there is one."""
    facts = {"python": sys.version.split()[0], **versions(PACKAGES)}
    import torch

    facts["cuda"] = torch.version.cuda
    facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["driver"] = nvidia_driver()
    return facts


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The version of each package, ``None`` where it is not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver, or ``None`` without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None
