"""Versions and devices, for bug reports and beside measured numbers."""

import subprocess
import sys
from importlib import metadata

PACKAGES = ("liger-trainer", "torch", "triton", "transformers", "accelerate", "trl", "peft", "datasets", "deepspeed")


def environment() -> dict[str, str | list[str] | None]:
    """Versions of what matters and the names of the GPUs; starts the first GPU if there is one."""
    facts = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = None
    import torch

    facts["cuda"] = torch.version.cuda
    facts["devices"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts["driver"] = nvidia_driver()
    return facts


def nvidia_driver() -> str | None:
    """Version of the NVIDIA driver, or ``None`` without one."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None
