"""Several GPUs: bf16 parity of every engine over NCCL, then a step of Llama 3 8B with and without the kernels.

    python benchmarks/experiments/distributed_gpu.py --out FOLDER [--gpus 2] [--only parity speed] [--batches 32 64]

writes ``distributed.json`` anew after each launch, so that what was measured before a timeout stays. An engine that is
not installed, or a batch that does not fit, is a row that says so. Parity runs on two ranks always. Without a GPU,
``--model tiny`` shows that the script runs at all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
WORKERS = {"parity": "benchmarks.experiments.distributed_parity", "speed": "benchmarks.experiments.distributed_step"}


def jobs(only: list[str], batches: list[int], model: str, gpus: int) -> list[dict]:
    """What to launch, the telling ones first."""
    parity = [{"part": "parity", "engine": engine, "gpus": 2} for engine in ENGINES]
    speed = [
        {"part": "speed", "engine": engine, "gpus": gpus, "arm": arm, "model": model, "batch": batch, "seq": 512}
        for engine in ("fsdp2", "zero3")
        for batch in batches
        for arm in ("hf", "ours")
    ]
    return [job for job in [*parity, *speed] if job["part"] in only]


def launch(job: dict, timeout: float) -> dict:
    """Run one job; its rows, or how it failed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(job["gpus"])]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8")}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as log:
        result = Path(folder) / "result.json"
        worker = subprocess.Popen(
            [*command, "-m", WORKERS[job["part"]], json.dumps(job), str(result)], cwd=ROOT, env=environment,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            code = worker.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            worker.terminate()  # the launcher passes it on to the ranks
            worker.wait()
            code = "timeout"
        log.seek(0)
        rows = json.loads(result.read_text()) if result.exists() else {"status": "failed", "tail": log.read()[-3000:]}
    return {**job, "exit": code, "seconds": round(time.perf_counter() - start, 1), **rows}


def main() -> None:
    """Run the jobs one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=sorted(WORKERS), default=sorted(WORKERS))
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--model", default="llama-3-8b", help="of the speed part, a name in benchmarks/models.py")
    parser.add_argument("--timeout", type=float, default=150, help="seconds for one launch")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for job in jobs(options.only, options.batches, options.model, options.gpus):
        results.append(launch(job, options.timeout))
        (options.out / "distributed.json").write_text(json.dumps(results, indent=1))
        print(json.dumps(results[-1])[:1500], flush=True)


if __name__ == "__main__":
    main()
