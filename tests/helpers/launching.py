"""The environment of the processes that tests start."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
# They import what this process can import, wherever it found that, and the modules beside the tests.
PYTHONPATH = os.pathsep.join([str(TESTS / "helpers"), str(TESTS), *sys.path])
# For ranks that train on the CPU.
CPU_ENVIRONMENT = {
    **os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
INTERPRETED = {**CPU_ENVIRONMENT, "TRITON_INTERPRET": "1"}  # with the kernels in Triton's interpreter
