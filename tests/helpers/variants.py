"""The calls of each op that the compiler and the sanitizer check: small shapes, each switch of a kernel on and off."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, build, definition, own_op, parse, small_shape
from benchmarks.ops import OPS
from liger_trainer.kernels import reference


@dataclass(frozen=True)
class Variant:
    """One call of an op, to be compared with the op's definition.

    Args:
        note: what is special about this variant.
        spec: sizes that differ from the op's other variants.
        leaves: the arguments that get gradients; by default the op's ``leaves``.
        without: arguments that are None.
        options: keyword arguments of the op and of its definition; a function makes a value from the labels.
        ours: keyword arguments of the op alone, in the same form.
        outputs: how many outputs are used; by default all.
        autocast: fp32 inputs, the op under autocast to bf16.
    """

    note: str = ""
    spec: dict[str, Any] = field(default_factory=dict)
    leaves: str | None = None
    without: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    outputs: int | None = None
    autocast: bool = False


def speculation(labels: Tensor) -> object:
    """A fresh state for ``linear_logprobs``."""
    from liger_trainer.kernels.linear_logprobs import Speculation

    return Speculation()


NARROW = {"rows": 111, "cols": 24}
TIGHT = {"logits_budget_mib": 0.01}  # many chunks
LOW, LOW_TIGHT = {"low_memory": True}, {"low_memory": True, **TIGHT}
NUM_ITEMS = {"num_items": lambda labels: torch.tensor(7.0, device=labels.device)}
CAPPED = {"softcap": 5.0, "label_smoothing": 0.1, **NUM_ITEMS}
# Other ops have one variant, without options.
VARIANTS = {
    "rms_norm": (
        Variant(), Variant("narrow", NARROW, leaves="x"), Variant("no weight", without="weight"),
        Variant("weight alone", leaves="weight"), Variant("one row", {"rows": 1}),
        Variant("gemma", options={"weight_offset": 1.0, "scale_in_fp32": True}),
    ),
    "layer_norm": (
        Variant(), Variant("narrow", NARROW, leaves="x weight"), Variant("no weight", without="weight bias"),
        Variant("weights alone", leaves="weight bias"), Variant("bias alone", leaves="x bias", without="weight"),
        Variant("one row", {"rows": 1}),
    ),
    "swiglu": (Variant(), Variant("gate alone", leaves="gate"), Variant("up alone", leaves="up")),
    "geglu": (Variant("packed", without="up"), Variant("exact", options={"approximate": "none"})),
    "clamped_swiglu": (
        Variant(options={"limit": 1.0}), Variant("interleaved", options={"limit": 1.0, "interleaved": True}),
    ),
    "rope": (
        Variant(spec={"rotary_dim": 16}), Variant("q alone", {"rotary_dim": 16}, leaves="q", without="k"),
        Variant("interleaved", {"rotary_dim": 16}, options={"interleaved": True}),
        Variant("deinterleaved", {"rotary_dim": 16, "one_per_pair": True},
                options={"interleaved": True, "deinterleave": True, "rotary_dim": 16}),
    ),
    "cross_entropy": (
        Variant(), Variant("num_items", options=NUM_ITEMS), Variant("not reduced", options={"reduction": "none"}),
        Variant("every option", options={"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 5.0,
                                         "token_weights": lambda labels: torch.rand_like(labels, dtype=torch.float32)}),
    ),
    "divergence": (
        Variant(without="mask"), Variant("reverse", options={"kind": "reverse_kl", "softcap": 5.0}),
        Variant("jsd", options={"kind": "jsd", "beta": 0.3, "teacher_softcap": 5.0, "temperature": 2.0}),
        Variant("tvd", options={"kind": "tvd", "reduction": "none"}),
    ),
    "linear_cross_entropy": (
        *(Variant(str(ours), ours=ours) for ours in (TIGHT, LOW, LOW_TIGHT)),
        *(Variant(f"capped {ours}", options=CAPPED, ours=ours) for ours in (TIGHT, LOW_TIGHT)),
        Variant("autocast", autocast=True),
    ),
    "linear_logprobs": (
        Variant(ours=TIGHT), Variant("speculated", ours={"speculation": speculation, **TIGHT}),
        Variant("frozen", leaves="hidden", ours=TIGHT),
        *(Variant(f"capped {ours}", leaves="hidden", options={"softcap": 5.0}, ours=ours, outputs=1)
          for ours in (TIGHT, LOW_TIGHT)),
    ),
}  # fmt: skip


def variants(rows: int, cols: int, device: str) -> Iterator[tuple[str, Callable, Callable, list[Tensor]]]:
    """Name, our call, the definition's call, and the leaves of every variant of every op."""
    for name in OPS:
        for variant in VARIANTS.get(name, (Variant(),)):
            case, ours, theirs = calls(name, variant, rows, cols, device)
            yield f"{name} {variant.note}".rstrip(), ours, theirs, case.leaf_tensors()
    leaves = [torch.randn(n, cols, device=device).to(torch.bfloat16).requires_grad_() for n in (rows, rows, 50)]
    definition_of_gated_linear = lambda gate, up, weight: reference.swiglu(gate, up) @ weight.t()  # noqa: E731
    ours, theirs = (functools.partial(op, *leaves) for op in (own_op("gated_linear"), definition_of_gated_linear))
    yield "gated_linear", ours, theirs, leaves
    yield from splade_variants(rows, cols, device)


def splade_variants(rows: int, cols: int, device: str) -> Iterator[tuple[str, Callable, Callable, list[Tensor]]]:
    """The same of ``linear_splade``: two sequences, half as wide as the vocabulary is large."""
    shapes = ((2, rows, cols // 2), (cols, cols // 2), (cols,))
    leaves = [torch.randn(shape, device=device).to(torch.bfloat16).requires_grad_() for shape in shapes]
    mask = torch.rand(2, rows, device=device) < 0.7
    for options in (
        {},
        {"activation": "log1p_relu"},
        {"pooling": "sum"},
        {"pooling": "sum", "activation": "log1p_relu"},
    ):
        ops = (own_op("linear_splade"), reference.linear_splade)
        yield f"linear_splade {options}", *(functools.partial(op, *leaves, mask, **options) for op in ops), leaves


def calls(name: str, variant: Variant, rows: int, cols: int, device: str) -> tuple[Case, Callable, Callable]:
    """The inputs of a variant, and the calls of the op and of its definition on them."""
    spec = parse(name, small_shape(name, rows, cols)) | variant.spec
    case = build(spec | {"dtype": "float32" if variant.autocast else "bfloat16"}, device)
    case.tensors |= dict.fromkeys(variant.without.split())
    wanted = case.leaves if variant.leaves is None else variant.leaves.split()
    case.leaves = tuple(leaf for leaf in wanted if case.tensors[leaf] is not None)
    inputs = [t if t is None or n in case.leaves else t.detach() for n, t in case.tensors.items()]

    def values(options: dict[str, Any]) -> dict[str, Any]:
        return {key: value(case["labels"]) if callable(value) else value for key, value in options.items()}

    options = values(variant.options)
    ours = functools.partial(own_op(name), *inputs, **options, **values(variant.ours))
    theirs = functools.partial(definition(name), *inputs, **options)
    if variant.autocast:
        ours = torch.autocast(device, torch.bfloat16)(ours)
    if variant.outputs is not None:
        all_ours, all_theirs = ours, theirs
        return case, lambda: all_ours()[: variant.outputs], lambda: all_theirs()[: variant.outputs]
    return case, ours, theirs
