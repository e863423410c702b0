"""One rank of a process group: runs cases with the flag on, saves what the first rank recorded, and runs checks.

``torchrun ... -m ranks.worker DIRECTORY JOB`` with the models of ``save_models`` in the directory, and as JSON
``{"cases": [the fields of a Case, ...], "checks": [[name of a function in checks.py, engine], ...]}``.
With ``RANKS_ON_GPUS`` in the environment each rank has a GPU, in place of the CPU.
"""

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.state import AcceleratorState, GradientState
from ranks import checks
from ranks.cases import Case, resume, run

from liger_trainer.kernels.runtime import launch
from liger_trainer.memory import card, recompute
from liger_trainer.unpadding import stack

torch.set_num_threads(1)
ON_GPUS = "RANKS_ON_GPUS" in os.environ
if ON_GPUS:
    stack.MULTIPLE["cuda"] = 1  # rounded up, rows as short as the cases' would not be un-padded
ZERO2 = {"stage": 2}
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def settings(engine: str) -> dict:
    """Training arguments that ask for the engine."""
    return {"use_cpu": not ON_GPUS} | _of_engine(engine)


def _of_engine(engine: str) -> dict:
    if engine == "ddp":
        return {}
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"reshard_after_forward": True}}
    sharding = dict({"zero2": ZERO2, "zero3": ZERO3}[engine])
    config = {
        "zero_optimization": sharding,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(AUTO, "auto"),
    }
    return {"deepspeed": config}


def init_deepspeed():
    """DeepSpeed's own view of the process group, which it needs before a model is partitioned."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo")


def reset():
    """Forget the last run's engine: accelerate expects one of them a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()


def leave() -> NoReturn:
    """End a rank that has done its work, without the interpreter's shutdown: see FailureGuard.end_success."""
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class AmpleCard:
    """A card on which nothing is ever allocated."""

    def read(self):
        return card.Reading(0, 0, 10**12, 10**12)

    def allocated(self):
        return 0

    peak = allocated


def made_up_card(there: bool):
    """Whether there is one. The planner then wants one layer to recompute on the first rank and three on the second."""
    card.has_cards = lambda: there
    card.card_of = lambda device: AmpleCard()
    wanted = 1 + 2 * torch.distributed.get_rank()
    recompute.layers_to_recompute = lambda costs, budget, order: frozenset(order[:wanted])


def run_case(case: Case, directory: str):
    launch.INTERPRET = case.triton
    made_up_card(case.recompute)
    result = run(case, directory, True, 2, **settings(case.engine))
    reset()
    if case.checkpoint:
        result["resumed"] = resume(case, directory, **settings(case.engine))
        reset()
    calls = torch.tensor(result["calls_fused"], device="cuda" if ON_GPUS else "cpu")
    torch.distributed.all_reduce(calls, op=torch.distributed.ReduceOp.MIN)
    result["calls_fused"] = calls.item()
    if torch.distributed.get_rank() == 0:
        torch.save(result, Path(directory) / f"{case.name}.pt")


def main(directory: str, job: str):
    job = json.loads(job)
    cases = [Case(**fields) for fields in job["cases"]]
    init_deepspeed()
    # One after the other, with its checks: ZeRO-3 would partition every model that is made after its own.
    for engine in dict.fromkeys(case.engine for case in cases):
        for case in (case for case in cases if case.engine == engine):
            start = time.perf_counter()
            run_case(case, directory)
            print(f"{case.name}: {time.perf_counter() - start:.1f} s", flush=True)
        for name in (name for name, of in job["checks"] if of == engine):
            launch.INTERPRET = name in checks.TRITON
            start = time.perf_counter()
            getattr(checks, name)(directory, settings(engine))
            reset()
            print(f"{name} {engine}: {time.perf_counter() - start:.1f} s", flush=True)
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
