"""The processes that tests start."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).parents[1]
# They import what this process can import, wherever it found that, and the modules beside the tests.
PYTHONPATH = os.pathsep.join([str(TESTS / "helpers"), str(TESTS), *sys.path])
# For ranks that train on the CPU.
CPU_ENVIRONMENT = {
    **os.environ, "PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip
INTERPRETED = {**CPU_ENVIRONMENT, "TRITON_INTERPRET": "1"}  # with the kernels in Triton's interpreter
ON_GPUS = {**os.environ, "PYTHONPATH": PYTHONPATH, "RANKS_ON_GPUS": "1"}  # see ranks/worker.py
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


@contextmanager
def two_ranks(module: str, folder: Path, job: object, environment: dict[str, str] = INTERPRETED) -> Iterator[None]:
    """Two ranks of ``module`` run ``job`` beside the body of the context, and have to succeed."""
    with (folder / "log").open("w+") as log:
        command = [*TORCHRUN, module, str(folder), json.dumps(job)]
        launcher = subprocess.Popen(command, env=environment, cwd=TESTS, stdout=log, stderr=subprocess.STDOUT)
        try:
            yield
            status = launcher.wait(timeout=500)
        finally:
            launcher.kill()
        log.seek(0)
        assert status == 0, log.read()[-6000:]
