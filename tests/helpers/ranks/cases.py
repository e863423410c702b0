"""Training runs that several ranks and a single process must agree on, and what is recorded of them."""

from dataclasses import dataclass

import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.tensor import DTensor
from training import Rows, arguments, losses
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import DPOTrainer, SFTTrainer

from liger_trainer import LigerDPOConfig, LigerSFTConfig, LigerTrainingArguments
from liger_trainer.patching import patch_state

STEPS = 2
SETTINGS = {
    "max_steps": STEPS, "optim": "sgd", "learning_rate": 0.1, "train_sampling_strategy": "sequential",
    "max_grad_norm": 1e6, "activation_checkpointing": False, "ddp_find_unused_parameters": False,
}  # fmt: skip


KINDS = {
    "trainer": (LigerTrainingArguments, {}),
    "sft": (LigerSFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}}),  # or rows without labels are dropped
    "dpo": (LigerDPOConfig, {}),
}


@dataclass(frozen=True)
class Case:
    """One run.

    ``triton``: the kernels in Triton's interpreter instead of the ops' plain definitions. ``checkpoint``: also resume
    from a checkpoint made half way, and load the result into a plain model. ``recompute``: layers recompute by memory,
    on a made-up card, and each rank wants another number of them.
    """

    engine: str
    trainer: str = "trainer"
    model_type: str = "llama"  # qwen2 has tied embeddings, deep is a llama of four layers
    lora: bool = False
    accumulation: int = 1
    triton: bool = False
    checkpoint: bool = False
    recompute: bool = False

    @property
    def name(self) -> str:
        parts = [self.engine, self.trainer, self.model_type, "lora" * self.lora, f"accumulate{self.accumulation}"]
        return "-".join(part for part in [*parts, "triton" * self.triton, "recompute" * self.recompute] if part)


def valid_labels(row: int) -> int:
    """With two ranks and a row each, the second has no label that counts in the first eight micro-batches."""
    return 0 if row % 2 and row < 16 else (12, 3, 7, 9)[row // 2 % 4]


def held_tokens(row: int) -> int:
    """With two ranks and a row each, one has a full row and the other a padded one, in turn."""
    return (12, 6, 9, 12)[row % 4]


def build(case: Case, directory, use_liger: bool, world_size: int, origin=None, **overrides) -> Trainer:
    """The case's Trainer, with the same rows in a step whatever the number of ranks.

    Arguments come before the model, as DeepSpeed asks for: under ZeRO-3 the weights are then partitioned from the
    start, before anything is patched. ``origin``: where the models are that the case starts from, else ``directory``.
    """
    settings = {**SETTINGS, "gradient_accumulation_steps": case.accumulation, "use_liger": use_liger}
    settings |= {"per_device_train_batch_size": 2 // world_size, **overrides}
    if case.checkpoint:  # an optimizer with a state; the epsilon keeps it from blowing up roundings
        settings |= {"optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 1e-2}
    settings["activation_checkpointing"] = case.recompute
    origin = origin or directory
    cls, own = KINDS[case.trainer]
    args = arguments(settings.pop("output_dir", directory), cls=cls, **own, **settings)
    if args.fsdp:  # accelerate ignores FSDP on CPU without a word, unless it takes the ranks for GPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = AutoModelForCausalLM.from_pretrained(f"{origin}/{case.model_type}")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(5)
    if case.trainer == "trainer":
        model = get_peft_model(model, lora) if case.lora else model
        evaluation = {"eval_dataset": Rows(8), "compute_metrics": mean_of_largest_logits}
        return Trainer(model, args, train_dataset=Rows(valid=valid_labels, held=held_tokens), **evaluation)
    common = {"args": args, "processing_class": tokenizer(), "peft_config": lora if case.lora else None}
    if case.trainer == "sft":
        padded = Rows(valid=valid_labels, held=held_tokens)
        rows = [
            {key: row[key][row["attention_mask"] != 0].tolist() for key in ("input_ids", "labels")} for row in padded
        ]
        return SFTTrainer(model, train_dataset=Dataset.from_list(rows), **common)
    reference = None if case.lora else AutoModelForCausalLM.from_pretrained(f"{origin}/reference")
    return DPOTrainer(model, ref_model=reference, train_dataset=dpo_rows(), **common)


def save_models(directory) -> None:
    """What the cases start from."""
    tiny_model("llama").save_pretrained(f"{directory}/llama")
    tiny_model("llama", num_hidden_layers=4).save_pretrained(f"{directory}/deep")
    tiny_model("qwen2").save_pretrained(f"{directory}/qwen2")
    tiny_model("llama", seed=1).save_pretrained(f"{directory}/reference")


def run(case: Case, directory, use_liger: bool, world_size: int, **overrides) -> dict:
    """Train, and return losses, gradient norms, each step's gradients and weights, and the calls of the fused loss."""
    if case.checkpoint:
        overrides |= {"save_strategy": "steps", "save_steps": 1, "output_dir": f"{directory}/{case.name}"}
    trainer = build(case, directory, use_liger, world_size, **overrides)
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    state = patch_state(trainer.model)
    heads = [] if state is None else [head for head in (state.fused, state.trl_head) if head is not None]
    calls_fused = sum(head.calls_fused for head in heads)
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    metrics = trainer.evaluate() if case.trainer == "trainer" else {}
    return {
        "losses": losses(trainer),
        "norms": norms,
        "start": recorder.start,
        "weights": recorder.weights,
        "gradients": recorder.gradients,
        "metrics": {name: metrics[name] for name in metrics.keys() & {"eval_loss", "eval_logits"}},
        "calls_fused": calls_fused,
        "steps_unpadded": 0 if state is None else state.report.ran["unpad"],
        "skipped": [] if state is None else [str(skipped) for skipped in state.report.skipped],
        "recomputed": [entry.get("recomputed_layers") for entry in trainer.state.log_history if "loss" in entry],
        "engine": engine_of(trainer),
    }


def resume(case: Case, directory, **overrides) -> dict[str, torch.Tensor]:
    """The weights after going on from the first step's checkpoint and saving, as a plain model reads them."""
    overrides |= {"output_dir": f"{directory}/{case.name}-resumed"}
    trainer = build(case, directory, True, 2, **overrides)
    trainer.train(resume_from_checkpoint=f"{directory}/{case.name}/checkpoint-1")
    assert trainer.state.global_step == STEPS
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    unset_hf_deepspeed_config()
    return AutoModelForCausalLM.from_pretrained(trainer.args.output_dir).state_dict()


def mean_of_largest_logits(prediction) -> dict[str, float]:
    """A metric that needs the logits' values."""
    return {"logits": float(prediction.predictions.max(-1).mean())}


def engine_of(trainer: Trainer) -> str:
    """The engine that really ran, told from the model it made."""
    if trainer.is_deepspeed_enabled:
        return f"zero{trainer.model_wrapped.zero_optimization_stage()}"
    if any(isinstance(p, DTensor) for p in trainer.model.parameters()):
        return "fsdp2"
    return "ddp" if isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel) else "none"


class Recorder(TrainerCallback):
    """Full copies of the gradients that the optimizer sees, and of the weights that it leaves behind."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.gradients, self.weights = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = full_weights(self.trainer.model)
        engine = getattr(self.trainer.accelerator, "deepspeed_engine_wrapped", None)
        if engine is not None:  # the step is part of backward there
            self.engine_step, engine.engine.step = engine.engine.step, self.deepspeed_step
            self.engine = engine.engine

    def deepspeed_step(self, *args, **kwargs):
        from deepspeed.utils import safe_get_full_grad

        if self.engine.is_gradient_accumulation_boundary():
            named = trainable(self.trainer.model)
            self.gradients.append({name: safe_get_full_grad(p).cpu().clone() for name, p in named})
        return self.engine_step(*args, **kwargs)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:
            self.gradients.append({name: full(p.grad) for name, p in trainable(self.trainer.model)})

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(full_weights(self.trainer.model))


def trainable(model) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def full_weights(model) -> dict[str, torch.Tensor]:
    return {name: full(p) for name, p in trainable(model)}


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A plain copy of a tensor that may be sharded; every rank has to call this."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().cpu().clone()
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def text(length: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def dpo_rows() -> Dataset:
    return Dataset.from_list(
        [{"prompt": text(4, i), "chosen": text(2 + 3 * i % 7, 30 + i), "rejected": text(6, 60 + i)} for i in range(16)]
    )
