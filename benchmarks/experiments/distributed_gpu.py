"""Two GPUs: bf16 parity of every engine over NCCL. For speed on several GPUs: ``liger-trainer bench train``.

    python benchmarks/experiments/distributed_gpu.py --out FOLDER

writes ``distributed.json`` anew after each launch, so that what was measured before a timeout stays. An engine that is
not installed is a row that says so. It runs without GPUs as well, over gloo.
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
WORKER = "benchmarks.experiments.distributed_parity"
RANKS = 2


def launch(job: dict, timeout: float) -> dict:
    """Run one job; its rows, or how it failed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "8")}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", errors="replace") as log:
        result = Path(folder) / "result.json"
        worker = subprocess.Popen(
            [*command, "-m", WORKER, json.dumps(job), str(result)], cwd=ROOT, env=environment, stdout=log,
            stderr=subprocess.STDOUT,
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
    """Run the engines one after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--timeout", type=float, default=150, help="seconds for one launch")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    results = []
    for engine in options.engines:
        results.append(launch({"engine": engine, "gpus": RANKS}, options.timeout))
        (options.out / "distributed.json").write_text(json.dumps(results, indent=1))
        print(json.dumps(results[-1])[:1500], flush=True)


if __name__ == "__main__":
    main()
