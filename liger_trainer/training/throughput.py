"""ThroughputCallback: tokens per second, step time, MFU and peak memory in the Trainer's own logs."""

import re
import sys
import time
from dataclasses import dataclass

import torch
from transformers import TrainerCallback

from ..probing.sharding import full_shape

# Dense bf16 TFLOP/s from the makers' data sheets. The first name that is contained in the device's, as words, counts.
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
WARMUP_STEPS = 2  # kernels compile and the allocator grows in the first steps
GIB = 2**30


class ThroughputCallback(TrainerCallback):
    """Adds training throughput and peak memory to what ``Trainer`` logs and keeps in ``log_history``.

    Each training log covers the optimizer steps since the one before; evaluation, saving and the first two steps of
    a run are left out. The final log (``train_runtime``) covers the whole run. Keys:

    - ``tokens_per_second``: real tokens (attention mask 1) of all ranks over the slowest rank's time;
      ``padded_tokens_per_second`` counts padding too. Ranks of one tensor-parallel group count once.
    - ``step_seconds``: the slowest rank's mean time of an optimizer step, data loading included.
    - ``mfu``: model FLOPs utilisation against the device's dense bf16 peak; absent where that peak or the model's
      count is not known. A token costs 6 FLOPs per trainable and 4 per frozen weight that takes part in a product
      (experts by the share that is active), an attended (query, key) pair ``12 * layers * heads * head_dim``: the
      count of PaLM (arXiv 2204.02311, appendix B) without the masked half. Recomputation is not counted.
    - ``peak_memory_allocated_gib``, ``peak_memory_reserved_gib``: since training began, the largest over the ranks
      (CUDA). On CPU, ``peak_memory_rss_gib``: the largest resident set of a process.

    Tokens are counted on the device, by a forward pre-hook on the model: the device is synchronised only where a log,
    an evaluation or a save is due. Works with every Trainer that calls its model with ``input_ids`` or
    ``inputs_embeds``. Reporters that stand before it in the Trainer's list (W&B, TensorBoard) do not see the keys:
    ``trainer.callback_handler.callbacks.insert(0, ThroughputCallback())`` puts it before them.
    """

    flops = None
    hook = None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Count the model's FLOPs while its parameters still have their shapes: FSDP flattens them."""
        self.flops = FlopCount.of(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Start the clock and the count of tokens."""
        if self.flops is None:
            self.flops = FlopCount.of(model)
        self.counts = {}
        self.interval, self.run = Tally(), Tally()
        self.warmup_left = WARMUP_STEPS
        if self.hook is not None:  # a run that broke off, as auto_find_batch_size lets them
            self.hook.remove()
        # First of all hooks: another may leave the attention mask out.
        self.hook = model.register_forward_pre_hook(self.count_tokens, with_kwargs=True, prepend=True)
        if args.device.type == "cuda":
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        self.mark = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        """Stop counting."""
        self.hook.remove()

    def on_step_end(self, args, state, control, **kwargs):
        """Add the step's time; wait for the device only where something other than training comes next."""
        self.lap(args, synchronise=self.warmup_left > 0 or interrupts(control))
        self.interval.steps += 1
        if self.warmup_left:
            self.warmup_left -= 1
            self.counts, self.interval = {}, Tally()

    def on_epoch_end(self, args, state, control, **kwargs):
        """The epoch's own log, evaluation and save follow: wait for the device as at the end of a step."""
        self.lap(args, synchronise=interrupts(control))

    def on_evaluate(self, args, state, control, **kwargs):
        """Leave out the evaluation's time."""
        self.mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        """Leave out the time it took to save."""
        self.mark = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the entries to ``logs`` and to its copy, which the Trainer has already put in ``log_history``."""
        final = "train_runtime" in logs
        if final or "loss" in logs:
            self.interval.take(self.counts)
            self.run.merge(self.interval)
            tally = self.run if final else self.interval
            entries = tally.entries(args, self.flops) | peak_memory(args.device)
            logs.update(entries)
            state.log_history[-1].update(entries)
            self.counts, self.interval = {}, Tally()
        self.mark = time.perf_counter()

    def lap(self, args, synchronise: bool):
        """Add the time since the last mark to the interval."""
        if synchronise and args.device.type != "cpu":
            torch.accelerator.synchronize()
        now = time.perf_counter()
        self.interval.seconds += now - self.mark
        self.mark = now

    @torch.compiler.disable  # the totals change at every call: a compiled model would be compiled anew each time
    def count_tokens(self, module, inputs, kwargs):
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
        elif torch.is_tensor(positions) and positions.dim() == 2:  # packed rows: positions restart with each text
            real, pairs = padded, (positions + 1).sum()
        else:
            real, pairs = padded, padded * (tokens.shape[-1] + 1) // 2
        counts = torch.stack([real, padded, pairs])
        # By device: nn.DataParallel calls the replicas' hooks from one thread for each device.
        self.counts[counts.device] = self.counts.get(counts.device, 0) + counts


@dataclass
class Tally:
    """What one rank did in a stretch of training."""

    seconds: float = 0.0
    steps: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    attended_pairs: int = 0

    def take(self, counts: dict[torch.device, torch.Tensor]):
        """Add the hook's totals; waits for the devices."""
        for values in counts.values():
            real, padded, pairs = values.tolist()
            self.real_tokens += real
            self.padded_tokens += padded
            self.attended_pairs += pairs

    def merge(self, other: "Tally"):
        """Add ``other``."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def entries(self, args, flops: "FlopCount") -> dict[str, float]:
        """Log entries for all ranks together: every rank has to call this. Empty where no step was measured."""
        if not self.steps:
            return {}
        sums = reduce_over_ranks([self.real_tokens, self.padded_tokens, self.attended_pairs], "sum", args.device)
        (seconds,) = reduce_over_ranks([self.seconds], "max", args.device)
        copies = args.parallelism_config.tp_size if args.parallelism_config else 1
        real, padded, pairs = (value / copies for value in sums)
        entries = {
            "tokens_per_second": real / seconds,
            "padded_tokens_per_second": padded / seconds,
            "step_seconds": seconds / self.steps,
        }
        peak = peak_tflops(args.device)
        if peak is not None and flops.per_token is not None:
            done = real * flops.per_token + pairs * flops.per_pair
            entries["mfu"] = done / seconds / (peak * 1e12 * args.world_size * max(1, args.n_gpu))
        return entries


@dataclass(frozen=True)
class FlopCount:
    """Training FLOPs of a model, forward and backward; ``per_token`` is ``None`` where the structure is not known."""

    per_token: float | None = None
    per_pair: float = 0.0

    @classmethod
    def of(cls, model) -> "FlopCount":
        """Count ``model``'s; unknown for multimodal, encoder-decoder, quantised and attention-free models."""
        config = getattr(model, "config", None)
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


def interrupts(control) -> bool:
    """Whether a log, an evaluation or a save follows."""
    return control.should_log or control.should_evaluate or control.should_save


def peak_tflops(device: torch.device) -> float | None:
    """The device's dense bf16 peak, or ``None`` where the table lacks it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_TFLOPS.items() if re.search(rf"\b{known}\b", name)), None)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Largest memory of any rank in GiB: every rank has to call this. Empty where it cannot be measured."""
    if device.type == "cuda":
        # One process may hold a model spread over several devices; those it does not use read zero.
        indices = range(torch.cuda.device_count())
        peaks = {
            "peak_memory_allocated_gib": max(torch.cuda.max_memory_allocated(i) for i in indices) / GIB,
            "peak_memory_reserved_gib": max(torch.cuda.max_memory_reserved(i) for i in indices) / GIB,
        }
    elif device.type == "cpu" and sys.platform != "win32":
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        peaks = {"peak_memory_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    else:
        return {}
    return dict(zip(peaks, reduce_over_ranks(list(peaks.values()), "max", device), strict=True))


def reduce_over_ranks(values: list[float], how: str, device: torch.device) -> list[float]:
    """``values`` summed (``"sum"``) or the largest taken (``"max"``) over the ranks, element by element."""
    if not torch.distributed.is_initialized():
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    op = torch.distributed.ReduceOp.SUM if how == "sum" else torch.distributed.ReduceOp.MAX
    torch.distributed.all_reduce(tensor, op=op)
    return tensor.tolist()
