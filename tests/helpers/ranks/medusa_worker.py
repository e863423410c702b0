"""One rank of a process group that trains Medusa models: ``torchrun ... -m ranks.medusa_worker DIRECTORY JOB``.

``JOB`` is JSON, a list of [engine, stage, variant], where the variant is one of ``VARIANTS``; the directory holds
``medusa-STAGE`` as ``save_pretrained`` writes it.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState
from ranks.cases import SETTINGS, Recorder, engine_of, valid_labels
from ranks.worker import init_deepspeed, leave, reset, settings
from training import Rows, arguments, losses
from transformers import Trainer

from liger_trainer import MedusaModel
from liger_trainer.kernels.runtime import launch
from liger_trainer.patching import patch_state

VARIANTS = ("fp32", "bf16", "checkpointed")  # the last in fp32, with activation checkpointing by the engine


def run(directory, stage: int, use_liger: bool, world_size: int, output_dir, **overrides) -> dict:
    """Train by the rows and settings of the other distributed cases, two micro-batches to a step."""
    args = arguments(
        output_dir, use_liger=use_liger, per_device_train_batch_size=2 // world_size, gradient_accumulation_steps=2,
        **SETTINGS, **overrides,
    )  # fmt: skip
    if args.fsdp:  # accelerate ignores FSDP on CPU without a word, unless it takes the ranks for GPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = MedusaModel.from_pretrained(f"{directory}/medusa-{stage}")
    trainer = Trainer(model, args, train_dataset=Rows(valid=valid_labels))
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    result = {
        "losses": losses(trainer),
        "weights": [without_wrappers(tensors) for tensors in recorder.weights],
        "gradients": [without_wrappers(tensors) for tensors in recorder.gradients],
        "engine": engine_of(trainer),
        "fused": use_liger and patch_state(model).fused.calls_fused,
    }
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return result


def without_wrappers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors by the names that the model has without activation checkpointing."""
    return {name.replace("_checkpoint_wrapped_module.", ""): tensor for name, tensor in tensors.items()}


def main(directory: str, job: str):
    job = json.loads(job)
    launch.INTERPRET = False
    init_deepspeed()
    for engine, stage, variant in job:
        assert variant in VARIANTS
        name = f"{engine}-{stage}-{variant}"
        options = settings(engine) | {"bf16": variant == "bf16"}
        if variant == "checkpointed":
            options["fsdp_config"]["activation_checkpointing"] = True
        result = run(directory, stage, True, 2, f"{directory}/{name}", **options)
        reset()
        if torch.distributed.get_rank() == 0:
            torch.save(result, Path(directory) / f"{name}.pt")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
