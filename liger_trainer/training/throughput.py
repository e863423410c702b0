"""ThroughputCallback: tokens per second, step time, MFU and peak memory in the Trainer's own logs."""

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..probing.probe import full_shape

# Dense bf16 TFLOP/s from the vendors' data sheets. The first entry whose words occur in the device's name counts.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L4": 121.0,
    "MI300X": 1307.4,
}
GIB = 2**30


class ThroughputCallback(TrainerCallback):
    """Adds training throughput and peak memory to what ``Trainer`` logs and keeps in ``log_history``.

    Each training log covers the optimizer steps since the previous one. Evaluation, saving and the warm-up steps are
    left out. The final log (``train_runtime``) covers the whole run. Keys:

    - ``tokens_per_second``: real tokens (attention mask 1) of all ranks, divided by the slowest rank's time.
      ``padded_tokens_per_second`` includes padding. Ranks of one tensor-parallel group count once.
    - ``step_seconds``: the slowest rank's mean time per optimizer step, including data loading.
    - ``mfu``: model FLOPs utilisation relative to the device's dense bf16 peak. Absent if that peak or the model's
      FLOP count is unknown. A token costs 6 FLOPs per trainable weight and 4 per frozen weight that takes part in a
      matrix product (experts count by the share that is active), and an attended (query, key) pair costs
      ``12 * layers * heads * head_dim``. This is the count of PaLM (arXiv 2204.02311, appendix B) without the masked
      half. Recomputation is not counted.
    - ``peak_memory_allocated_gib``, ``peak_memory_reserved_gib``: the largest value of any rank since training began
      (CUDA). On CPU, ``peak_memory_rss_gib``: the largest resident set of any process.

    Tokens are counted on the device by a forward pre-hook on the model. The device is synchronised only before a log,
    an evaluation or a save, and during warm-up. Works with every Trainer that calls its model with ``input_ids`` or
    ``inputs_embeds``. Reporters that precede this callback in the Trainer's list (W&B, TensorBoard) do not see the
    keys: ``trainer.callback_handler.callbacks.insert(0, ThroughputCallback())`` puts it first.

    Args:
        warmup_steps: optimizer steps at the start of a run that are not measured, because kernels compile and the
            allocator grows.

    Attributes:
        intervals: the measurements behind the logs of the current or last run, one ``Interval`` per training log.
            With ``logging_steps=1`` that is one per step.
    """

    def __init__(self, warmup_steps: int = 2) -> None:
        self.warmup_steps = warmup_steps
        self.intervals: list[Interval] = []
        self.flops: FlopCount | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._steps_done = 0
        self._mark = 0.0
        self._reset_interval()
        self._run = Interval()

    def _reset_interval(self) -> None:
        self.counts: dict[torch.device, torch.Tensor] = {}  # real tokens, padded tokens, attended pairs
        self._interval = Interval()

    def on_init_end(self, *_: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Count the model's FLOPs before FSDP flattens its parameters."""
        self.flops = FlopCount.of(model)

    def on_train_begin(self, args: TrainingArguments, *_: Any, model: nn.Module, **kwargs: Any) -> None:
        """Start the clock and the token counts."""
        if self.flops is None:
            self.flops = FlopCount.of(model)
        self.intervals, self._run, self._steps_done = [], Interval(), 0
        self._reset_interval()
        if self._hook is not None:  # an earlier run was interrupted, as happens with auto_find_batch_size
            self._hook.remove()
        # Before all other hooks, because another one may drop the attention mask.
        self._hook = model.register_forward_pre_hook(self.count_tokens, with_kwargs=True, prepend=True)
        if args.device.type == "cuda":
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        self._mark = time.perf_counter()

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Stop counting."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Add the step's time. Synchronise only if something other than training follows, or during warm-up."""
        warming_up = self._steps_done < self.warmup_steps
        self._lap(args, synchronise=warming_up or _interrupts(control))
        self._interval.steps += 1
        self._steps_done += 1
        if warming_up:
            self._reset_interval()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Synchronise as at the end of a step: the epoch's own log, evaluation and save may follow."""
        self._lap(args, synchronise=_interrupts(control))

    def on_evaluate(self, *_: Any, **kwargs: Any) -> None:
        """Leave out the time of the evaluation."""
        self._mark = time.perf_counter()

    def on_save(self, *_: Any, **kwargs: Any) -> None:
        """Leave out the time of saving."""
        self._mark = time.perf_counter()

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Add the entries to ``logs`` and to the copy that the Trainer has already put in ``log_history``."""
        final = "train_runtime" in logs
        if final or "loss" in logs:
            self._interval.take(self.counts)
            self._run.merge(self._interval)
            measured = (self._run if final else self._interval).over_ranks(args)
            measured.last_step = state.global_step
            if measured.steps and not final:
                self.intervals.append(measured)
            entries = measured.entries(args, self.flops or FlopCount())
            logs.update(entries)
            state.log_history[-1].update(entries)
            self._reset_interval()
        self._mark = time.perf_counter()

    def _lap(self, args: TrainingArguments, synchronise: bool) -> None:
        """Add the time since the last mark to the interval."""
        if synchronise and args.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self._interval.seconds += now - self._mark
        self._mark = now

    @torch.compiler.disable()  # the totals change at every call, so a compiled model would recompile each time
    def count_tokens(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a training forward's real tokens, padded tokens and attended pairs to its device's totals."""
        if not module.training:
            return
        tokens = kwargs.get("input_ids", inputs[0] if inputs else None)
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        padded = torch.full((), tokens.numel(), dtype=torch.int64, device=tokens.device)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if torch.is_tensor(mask) and mask.dim() == 2:
            lengths = mask.sum(-1, dtype=torch.int64)
            real, pairs = lengths.sum(), (lengths * (lengths + 1)).sum() // 2
        elif torch.is_tensor(positions) and positions.dim() == 2:  # packed rows: positions restart at each text
            real, pairs = padded, (positions + 1).sum()
        else:
            real, pairs = padded, padded * (tokens.shape[-1] + 1) // 2
        counts = torch.stack([real, padded, pairs])
        # Per device: nn.DataParallel calls the hooks of its replicas from one thread per device.
        self.counts[counts.device] = self.counts.get(counts.device, 0) + counts


@dataclass
class Interval:
    """A stretch of training: measured by one rank while it runs, then combined over all ranks.

    Attributes:
        seconds: time of the slowest rank.
        steps: optimizer steps.
        last_step: ``global_step`` at the end.
        real_tokens: tokens with attention mask 1, of all ranks.
        padded_tokens: tokens including padding, of all ranks.
        attended_pairs: (query, key) pairs under the causal mask, of all ranks.
        peak_gib: as ``peak_memory`` returns it, since training began.
    """

    seconds: float = 0.0
    steps: int = 0
    last_step: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    attended_pairs: int = 0
    peak_gib: dict[str, float] = field(default_factory=dict)

    def take(self, counts: dict[torch.device, torch.Tensor]) -> None:
        """Add the hook's totals. Waits for the devices."""
        for values in counts.values():
            real, padded, pairs = values.tolist()
            self.real_tokens += real
            self.padded_tokens += padded
            self.attended_pairs += pairs

    def merge(self, other: "Interval") -> None:
        """Add the times and counts of ``other``."""
        for name in ("seconds", "steps", "real_tokens", "padded_tokens", "attended_pairs"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def over_ranks(self, args: TrainingArguments) -> "Interval":
        """The same interval of all ranks together. A collective: every rank must call it."""
        combined = Interval(steps=self.steps, peak_gib=peak_memory(args.device))
        if self.steps:
            counts = [self.real_tokens, self.padded_tokens, self.attended_pairs]
            copies = args.parallelism_config.tp_size if args.parallelism_config else 1
            sums = (round(value / copies) for value in reduce_over_ranks(counts, "sum", args.device))
            combined.real_tokens, combined.padded_tokens, combined.attended_pairs = sums
            (combined.seconds,) = reduce_over_ranks([self.seconds], "max", args.device)
        return combined

    def entries(self, args: TrainingArguments, flops: "FlopCount") -> dict[str, float]:
        """Log entries; only the memory entries if no step was measured."""
        memory = {f"peak_memory_{name}_gib": gib for name, gib in self.peak_gib.items()}
        if not self.steps:
            return memory
        entries = {
            "tokens_per_second": self.real_tokens / self.seconds,
            "padded_tokens_per_second": self.padded_tokens / self.seconds,
            "step_seconds": self.seconds / self.steps,
        }
        peak = peak_tflops(args.device)
        if peak is not None and flops.per_token is not None:
            done = self.real_tokens * flops.per_token + self.attended_pairs * flops.per_pair
            entries["mfu"] = done / self.seconds / (peak * 1e12 * args.world_size * max(1, args.n_gpu))
        return entries | memory


@dataclass(frozen=True)
class FlopCount:
    """Training FLOPs of a model, forward and backward. ``per_token`` is ``None`` if the structure is unknown."""

    per_token: float | None = None
    per_pair: float = 0.0

    @classmethod
    def of(cls, model: Any) -> "FlopCount":
        """Count ``model``'s FLOPs: unknown for multimodal, encoder-decoder, quantised and attention-free models."""
        config: Any = getattr(model, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if (
            not isinstance(heads, int)
            or config.get_text_config() is not config
            or config.is_encoder_decoder
            or getattr(model, "is_quantized", False)
        ):
            return cls()
        counts = (getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        experts = next((count for count in counts if count), None)
        active = getattr(config, "num_experts_per_tok", None)
        table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
        table_is_lookup = head is None or head.weight is not table
        per_token = 0.0
        for name, parameter in model.named_parameters():
            shape = full_shape(parameter)
            if len(shape) < 2 or (parameter is table and table_is_lookup):
                continue
            share = 1.0
            if ".experts." in name:
                if not experts or not active:
                    return cls()
                share = active / experts
            per_token += share * shape.numel() * (6 if parameter.requires_grad else 4)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(per_token, 12.0 * config.num_hidden_layers * heads * head_dim)


def _interrupts(control: TrainerControl) -> bool:
    """Whether a log, an evaluation or a save follows."""
    return control.should_log or control.should_evaluate or control.should_save


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, or ``None`` if it is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def peak_memory(device: torch.device) -> dict[str, float]:
    """The largest memory of any rank in GiB. A collective: every rank must call it.

    Returns:
        ``allocated`` and ``reserved`` on CUDA, ``rss`` on CPU, nothing where it cannot be measured.
    """
    if device.type == "cuda":
        # One process may hold a model spread over several devices; the unused ones read zero.
        indices = range(torch.cuda.device_count())
        peaks = {
            "allocated": max(torch.cuda.max_memory_allocated(i) for i in indices) / GIB,
            "reserved": max(torch.cuda.max_memory_reserved(i) for i in indices) / GIB,
        }
    elif device.type == "cpu" and sys.platform != "win32":
        import resource  # does not exist on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        peaks = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    else:
        return {}
    return dict(zip(peaks, reduce_over_ranks(list(peaks.values()), "max", device), strict=True))


def reduce_over_ranks(values: Sequence[float], how: Literal["sum", "max"], device: torch.device) -> list[float]:
    """The element-by-element sum or maximum of ``values`` over the ranks."""
    if not torch.distributed.is_initialized():
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    op = torch.distributed.ReduceOp.SUM if how == "sum" else torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(tensor, op=op)
    return tensor.tolist()
