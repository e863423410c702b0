"""The table of ops: each entry has inputs, measured shapes, and the bytes that must move."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Spec = dict[str, Any]  # a shape, as it travels to a worker and into a result file
EPS = 1e-6
VOCAB = 331  # of the small shapes


@dataclass(frozen=True)
class Draw:
    """Draws random inputs on one device, in one dtype, for one spec."""

    spec: Spec
    device: str

    def __call__(self, *names: str) -> Tensor:
        """Normal numbers; the sizes are named as in the spec, or numbers."""
        size = [self.spec.get(name) or int(name) for name in names]
        return torch.randn(*size, device=self.device, dtype=getattr(torch, self.spec["dtype"]))

    def labels(self, count: str, vocab: str) -> Tensor:
        """Labels of which the spec's share ``ignored`` is -100."""
        labels = torch.randint(self.spec[vocab], (self.spec[count],), device=self.device)
        share = self.spec.get("ignored", 0.0)
        return labels.masked_fill(torch.rand(len(labels), device=self.device) < share, -100) if share else labels


Inputs = tuple[dict[str, Tensor], tuple[Tensor | None, ...]]  # arguments by name, one upstream gradient per output


def plain(outputs: int = 1, **arguments: str) -> Callable[[Draw], Inputs]:
    """Normal numbers for every argument, whose sizes are given by name; outputs have the first one's shape."""

    def inputs(draw: Draw) -> Inputs:
        tensors = {name: draw(*sizes.split()) for name, sizes in arguments.items()}
        return tensors, tuple(torch.randn_like(next(iter(tensors.values()))) for _ in range(outputs))

    return inputs


def adapter(draw: Draw) -> Inputs:
    """An input and the two weights of an adapter."""
    b = draw("out", "rank") * draw.spec["rank"] ** -0.5
    return {"x": draw("rows", "cols"), "a": draw("rank", "cols") * draw.spec["cols"] ** -0.5, "b": b}, (
        draw("rows", "out"),
    )


def packed_gate_and_up(draw: Draw) -> Inputs:
    """Gate and up in one tensor, some of them beyond the limit."""
    gate, up = (draw("rows", "cols") * 4 for _ in range(2))
    return {"gate_up": torch.cat((gate, up), -1)}, (draw("rows", "cols"),)


def rotary(draw: Draw) -> Inputs:
    """Queries and keys as transformers passes them, transposed views of the projections' ``[B, T, H, D]`` outputs."""

    def heads(count: str) -> Tensor:
        return draw("batch", "seq", count, "head_dim").transpose(1, 2)

    width = draw.spec.get("rotary_dim", draw.spec["head_dim"])
    pairs = torch.arange(0, width, 2, device=draw.device) / width
    angles = torch.outer(torch.arange(draw.spec["seq"], device=draw.device).float(), 500000.0**-pairs)[None]
    angles = angles if draw.spec.get("one_per_pair") else angles.repeat(1, 1, 2)
    q, k = heads("q_heads"), heads("kv_heads")
    return {"q": q, "k": k, "cos": angles.cos().to(q.dtype), "sin": angles.sin().to(q.dtype)}, (
        heads("q_heads"),
        heads("kv_heads"),
    )


def logits(draw: Draw) -> Inputs:
    """Logits and labels."""
    return {"logits": draw("rows", "cols") * 2, "labels": draw.labels("rows", "cols")}, (None,)


def logits_of_two(draw: Draw) -> Inputs:
    """Logits of student and teacher, and the mask of those that count."""
    mask = draw.labels("rows", "cols") != -100
    return {"logits": draw("rows", "cols") * 2, "teacher_logits": draw("rows", "cols") * 2, "mask": mask}, (None,)


def head(draw: Draw) -> Inputs:
    """Hidden states, the head's weight, labels.

    Hidden states and weights have a mean, as in models: without it, the softmax part of the gradients averages to
    nothing, and a kernel that dropped it would pass the check.
    """
    weight = (draw("vocab", "hidden") + draw("hidden")) * (2 * draw.spec["hidden"] ** -0.5)
    hidden, labels = draw("tokens", "hidden") + draw("hidden") / 2, draw.labels("tokens", "vocab")
    per_token = draw.spec["op"] == "linear_logprobs"
    upstream = torch.randn(len(labels), device=draw.device) / len(labels) if per_token else None
    return {"hidden": hidden, "weight": weight, "labels": labels}, (upstream,)


@dataclass(frozen=True)
class Op:
    """One op of ``liger_trainer.kernels``.

    Args:
        inputs: makes the arguments, in the op's order, and the upstream gradients.
        leaves: the arguments that get gradients.
        moved: bytes that must move in forward and in backward, from the bytes of each argument: each input is read
            once, each output written once, row statistics do not count. None: matrix multiplications are the floor.
        shapes: the measured shapes, by set. ``float32``, ``frozen weight`` and ``30% ignored`` (labels) may follow.
        sizes: names of the numbers in a shape.
        options: keyword arguments of the op and of its definition in measured calls.
        small: the shape of tests, where ``rows`` and ``cols`` stand for numbers; with 5 and 48, also the set "smoke"
            unless ``shapes`` has one.
    """

    inputs: Callable[[Draw], Inputs]
    leaves: str
    moved: Callable[[dict[str, int]], tuple[int, int]] | None = None
    shapes: dict[str, str] = field(default_factory=dict)
    sizes: str = "rows cols"
    options: dict[str, Any] = field(default_factory=dict)
    small: str = "rowsxcols"


HEAD = "tokens hidden vocab"
SMALL_HEAD = (
    f"BTrows H8 V{VOCAB} 25% ignored"  # so small a hidden size that chunks of logits save memory (kernels/README.md)
)
# Shapes "today" are layers of Llama-3.2-1B, Qwen2.5-1.5B, Llama-3-8B, Gemma-7B and GPT-OSS-20B (8192 tokens, four
# experts each). Shapes "paper" are from Hsu et al., arXiv 2410.10989, section 4, and its authors' scripts.
OPS: dict[str, Op] = {
    "rms_norm": Op(
        plain(x="rows cols", weight="cols"), "x weight",
        lambda n: (2 * n["x"] + n["weight"], 3 * n["x"] + 2 * n["weight"]),
        {"anchors": "16384x4096, 4096x16384", "today": "8192x2048, 8192x1536, 8192x4096, 262144x128",
         "paper": "2048x4096, 2048x8192, 2048x16384, 2048x32768", "small": "64x2048, 64x4096, 4097x3001, 1x4096",
         "host": "64x2048"},
        options={"eps": EPS},
    ),
    "add_rms_norm": Op(  # both inputs have the same gradient: it is written once
        plain(2, x="rows cols", residual="rows cols", weight="cols"), "x residual weight",
        lambda n: (4 * n["x"] + n["weight"], 4 * n["x"] + 2 * n["weight"]),
        {"anchors": "16384x4096", "today": "8192x2048, 8192x1536", "small": "64x2048, 4097x3001", "host": "64x2048"},
        options={"eps": EPS},
    ),
    "layer_norm": Op(
        plain(x="rows cols", weight="cols", bias="cols"), "x weight bias",
        lambda n: (2 * n["x"] + n["weight"] + n["bias"], 3 * n["x"] + 2 * n["weight"] + n["bias"]),
        {"anchors": "16384x4096", "paper": "4096x4096 float32, 4096x8192 float32, 4096x16384 float32",
         "small": "64x2048, 4097x3001", "host": "64x2048"},
        options={"eps": EPS},
    ),
    "swiglu": Op(
        plain(gate="rows cols", up="rows cols"), "gate up", lambda n: (3 * n["gate"], 5 * n["gate"]),
        {"anchors": "16384x14336", "today": "8192x8192, 8192x8960", "paper": "16384x11008, 32768x11008, 65536x11008",
         "small": "64x8192, 1023x5461", "host": "64x2048"},
    ),
    "geglu": Op(
        plain(gate="rows cols", up="rows cols"), "gate up", lambda n: (3 * n["gate"], 5 * n["gate"]),
        {"anchors": "16384x14336", "today": "8192x24576", "paper": "16384x11008, 32768x11008, 65536x11008",
         "small": "64x8192, 1023x5461"},
    ),
    "clamped_swiglu": Op(
        packed_gate_and_up, "gate_up", lambda n: (n["gate_up"] * 3 // 2, n["gate_up"] * 5 // 2),
        {"today": "32768x2880", "small": "64x2880"},
        options={"interleaved": True},  # as GPT-OSS has them
    ),
    "lora_linear": Op(  # the adapter alone; x * b / a are the bytes of the output
        adapter, "x a b",
        lambda n: (n["x"] + n["x"] * n["b"] // n["a"], 2 * n["x"] + n["x"] * n["b"] // n["a"]),
        {"today": "8192x3072x3072 r16, 8192x3072x8192 r16, 8192x8192x3072 r16, 8192x4096x4096 r128"},
        "rows cols out rank",
        small="rowsxcolsx40 r8",
    ),
    "rope": Op(
        rotary, "q k", lambda n: (2 * n["q"] + 2 * n["k"] + n["cos"] + n["sin"],) * 2,
        {"anchors": "B4 T2048 32q 8kv d128, B4 T2048 64q 64kv d128",
         "today": "B8 T1024 32q 8kv d64, B8 T1024 12q 2kv d128",
         "paper": "B1 T2048 32q 8kv d256, B1 T16384 32q 8kv d256, B1 T2048 32q 8kv d512",
         "small": "B1 T64 32q 8kv d64, B2 T333 32q 8kv d128, B2 T333 6q 2kv d96", "host": "B1 T64 8q 8kv d64"},
        "batch seq q_heads kv_heads head_dim",
        small="B2 T19 3q 1kv d24",
    ),
    "cross_entropy": Op(
        logits, "logits", lambda n: (n["logits"], 2 * n["logits"]),
        {"anchors": "8192x32000, 8192x128256", "today": "8192x151936",
         "paper": "16384x40960, 16384x81920, 16384x122880, 16384x163840", "small": "64x32000, 1024x32003",
         "host": "64x2048"},
        small=f"rowsx{VOCAB} 25% ignored",
    ),
    "softmax": Op(plain(x="rows cols"), "x", lambda n: (2 * n["x"], 3 * n["x"])),
    "divergence": Op(
        logits_of_two, "logits", lambda n: (n["logits"] + n["teacher_logits"], 2 * n["logits"] + n["teacher_logits"]),
        small=f"rowsx{VOCAB} 25% ignored",
    ),
    "linear_cross_entropy": Op(
        head, "hidden weight", None,
        {"anchors": "BT8192 H4096 V128256, BT16384 H2048 V128256, BT16384 H1536 V151936, "
                    "BT8192 H3072 V256000, BT32768 H4096 V128256, BT8192 H4096 V128256 frozen weight, "
                    "BT8192 H4096 V128256 30% ignored",
         "today": "BT8192 H2048 V128256, BT8192 H1536 V151936", "small": "BT512 H2048 V32000, BT64 H2048 V128256",
         "paper": "BT4096 H4096 V128256, BT8192 H4096 V128256, BT16384 H4096 V128256",
         "smoke": "BT12 H16 V33, BT12 H16 V33 frozen weight 30% ignored"},
        HEAD,
        small=SMALL_HEAD,
    ),
    "linear_logprobs": Op(
        head, "hidden weight", None,
        {"anchors": "BT8192 H4096 V128256", "today": "BT8192 H1536 V151936", "smoke": "BT12 H16 V33 30% ignored"},
        HEAD,
        small=SMALL_HEAD,
    ),
}  # fmt: skip
MEASURED = tuple(name for name, op in OPS.items() if op.shapes)
