"""One rank of the parity runs: the CPU tests' cases on GPUs, unpatched in fp32 and bf16 and patched in bf16.

bf16 rounds either way, so the patched run is held to the unpatched one: its distance from the fp32 run may be half as
large again. Started by ``distributed_gpu.py`` as ``JOB RESULT_FILE``.
"""

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from distributed.cases import Case, resume, run, save_models
from distributed.worker import init_deepspeed, reset, settings

CUDA = torch.cuda.is_available()
CASES = [
    {"checkpoint": True},
    {"model_type": "qwen2", "accumulation": 4},
    {"lora": True, "accumulation": 4},
    {"trainer": "sft"},
    {"trainer": "sft", "model_type": "qwen2", "lora": True, "accumulation": 4},
    {"trainer": "dpo"},
]


def distance(run_: dict, exact: dict) -> dict[str, float]:
    """How far a run's losses and its first gradients are from another's; gradients by their joint norm."""
    ours, theirs = run_["gradients"][0], exact["gradients"][0]
    error = sum((ours[n].float() - g.float()).square().sum() for n, g in theirs.items()).sqrt()
    losses = max(abs(a - b) for a, b in zip(run_["losses"], exact["losses"], strict=True))
    return {"gradients": float(error / sum(g.float().square().sum() for g in theirs.values()).sqrt()), "loss": losses}


def measure(case: Case, directory: str) -> dict:
    """The three runs of one case."""
    runs = {}
    for name, flag, bf16 in (("exact", False, False), ("hf", False, True), ("ours", True, True)):
        options = settings(case.engine) | {"use_cpu": not CUDA, "bf16": bf16}
        runs[name] = run(case, directory, flag, 2, **options)
        reset()
    hf, ours = distance(runs["hf"], runs["exact"]), distance(runs["ours"], runs["exact"])
    row = {
        "case": case.name, "engine_ran": runs["ours"]["engine"], "calls_fused": runs["ours"]["calls_fused"],
        "skipped": runs["ours"]["skipped"], "hf": hf, "ours": ours,
        "ok": ours["gradients"] <= 1.5 * hf["gradients"] + 1e-4 and ours["loss"] <= 1.5 * hf["loss"] + 2e-2,
    }  # fmt: skip
    if case.checkpoint:
        resumed = resume(case, directory, **(settings(case.engine) | {"use_cpu": not CUDA, "bf16": True}))
        reset()
        last = runs["ours"]["weights"][-1]
        row["resumed"] = max(float((resumed[n].float() - w.float()).norm() / w.float().norm()) for n, w in last.items())
        row["ok"] = row["ok"] and row["resumed"] < 1e-2
    return row


def main(job: str, result: str) -> None:
    """Run every case of the engine; the first rank writes the rows after each."""
    engine = json.loads(job)["engine"]
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        Path(result).write_text(json.dumps({"status": "absent"}))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if CUDA:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if CUDA else "gloo")
        if engine.startswith("zero"):
            init_deepspeed()
        box = [folder]  # the first rank's, for all of them
        torch.distributed.broadcast_object_list(box)
        if torch.distributed.get_rank() == 0:
            save_models(box[0])
        torch.distributed.barrier()
        for fields in CASES:
            rows.append(measure(Case(engine, **fields), box[0]))
            if torch.distributed.get_rank() == 0:
                Path(result).write_text(json.dumps({"status": "ok", "rows": rows}))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
