"""The device time of a training step: the profiler's kernels, grouped by kind."""

import re
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# First match wins: attention kernels can have "cutlass" in their names.
GROUPS = {
    "attention": r"flash|fmha|attention|sdpa",
    "GEMM": r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|aten::(mm|addmm|bmm|linear|matmul)",
    "optimizer": r"adam|multi_tensor|foreach|lpnorm",
    "CE": r"cross_entropy|softmax|nll|log_?prob|logsumexp|_loss_|_ce_|^_(forward|backward|reduce|scale)_kernel$",
    "rope": r"rope|rotary",
    "GLU": r"glu|silu|gelu|gated",
    "norm": r"rms_?norm|layer_?norm|rsqrt|sum_partials|norm_(forward|backward|fwd|bwd)",
    "copy and fill": r"memcpy|memset|copy|fill|catarray",
}


def group_of(name: str) -> str:
    """The group of a kernel, by its name."""
    lowered = name.lower()
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, lowered)), "other")


class KernelProfile(TrainerCallback):
    """Profiles ``steps`` steps after ``warmup`` ones."""

    def __init__(self, device: str, warmup: int, steps: int):
        self.device, self.warmup, self.steps = device, warmup, steps
        activities = [ProfilerActivity.CUDA] if device == "cuda" else [ProfilerActivity.CPU]
        self.profiler = profile(activities=activities)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start after the warm-up, stop after the last step."""
        if state.global_step == self.warmup:
            self.profiler.start()
        elif state.global_step == self.warmup + self.steps:
            self.profiler.stop()

    def summary(self) -> dict:
        """``profile_groups``: ms per step by group; ``profile_kernels``: the 40 largest, with their group."""
        on_gpu, kernels, groups = self.device == "cuda", [], Counter()
        for event in self.profiler.key_averages():
            if on_gpu == (event.device_type == torch.autograd.DeviceType.CUDA):
                ms = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / self.steps
                group = group_of(event.key)
                groups[group] += ms
                calls = event.count / self.steps
                kernels.append({"name": event.key[:120], "group": group, "ms": round(ms, 4), "calls": calls})
        kernels.sort(key=lambda kernel: -kernel["ms"])
        return {
            "profile_groups": {group: round(ms, 4) for group, ms in groups.most_common()},
            "profile_kernels": kernels[:40],
        }
