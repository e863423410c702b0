"""A rank of the training benchmark in which something goes wrong; ``job["arm"]`` says what."""

import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

import torch

from benchmarks import train_worker


def short_of_memory_on_one_rank(job: dict) -> dict:
    """The second rank runs out of memory while the first waits for it in a collective; both have a data loader."""
    loader = multiprocessing.Process(target=time.sleep, args=(600,), daemon=True)
    loader.start()
    (Path(os.environ["LOADERS"]) / os.environ["RANK"]).write_text(str(loader.pid))
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    torch.distributed.barrier()
    raise AssertionError("the barrier needs both ranks")


def fail_after_the_first_rank(job: dict) -> dict:
    """The second rank finds something wrong when the first has its row."""
    if os.environ["RANK"] == "1":
        time.sleep(3)
        raise RuntimeError("arm ours was not active in this run")
    return {"status": "ok"}


def hang(job: dict) -> dict:
    """Never ends."""
    time.sleep(600)
    return {}


if __name__ == "__main__":
    jobs = json.loads(sys.argv[1])
    tasks = {"ours": short_of_memory_on_one_rank, "trl_head": fail_after_the_first_rank, "hf": hang}
    train_worker.train = tasks[jobs[0]["arm"]]
    train_worker.main(jobs)
