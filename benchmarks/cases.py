"""One op at one shape: its inputs, what it should compute, and the matrix multiplications that are its floor."""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ops import MEASURED, OPS, Draw, Spec
from liger_trainer.kernels import reference

SETS = ("anchors", "today", "paper", "small", "smoke", "host")
ALL = SETS[:4]  # the sets that "all" stands for
LOSSES = ("cross_entropy", "linear_cross_entropy", "linear_logprobs")
ROW_CHUNK = 1024  # rows of fp32 logits that the check holds at a time


@dataclass
class Case:
    """Random inputs of one op, in the order of its arguments; ``upstream`` has one gradient per output."""

    spec: Spec
    tensors: dict[str, Tensor | None]
    leaves: tuple[str, ...]  # the inputs that get gradients
    upstream: tuple[Tensor | None, ...]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    @property
    def op(self) -> str:
        """The op's name."""
        return self.spec["op"]

    def leaf_tensors(self) -> list[Tensor]:
        """The inputs that get gradients."""
        return [self[name] for name in self.leaves]


def own_op(name: str) -> Callable:
    """The function of ``liger_trainer.kernels``."""
    return getattr(importlib.import_module(f"liger_trainer.kernels.{name}"), name)


def definition(name: str) -> Callable:
    """The op's definition in plain PyTorch."""
    return getattr(reference, name)


def parse(op: str, shape: str) -> Spec:
    """A shape of the table as a spec."""
    numbers = map(int, re.findall(r"\d+", shape))
    spec: Spec = {"op": op, "shape": shape, **dict(zip(OPS[op].sizes.split(), numbers, strict=False))}
    ignored = re.search(r"(\d+)% ignored", shape)
    spec |= {"frozen": "frozen weight" in shape, "ignored": int(ignored[1]) / 100 if ignored else 0.0}
    return spec | {"dtype": "float32" if "float32" in shape else "bfloat16"}


def small_shape(op: str, rows: int, cols: int) -> str:
    """The small shape of an op."""
    return OPS[op].small.replace("rows", str(rows)).replace("cols", str(cols))


def select(sets: Sequence[str], ops: Sequence[str] = MEASURED) -> list[Spec]:
    """The shapes of ``sets`` (``all`` for anchors, today, paper and small) for ``ops``, each once, in that order."""
    found: list[Spec] = []
    for group in ALL if "all" in sets else sets:
        for op in (op for op in MEASURED if op in ops):
            smoke = small_shape(op, 5, 48) if group == "smoke" else ""
            specs = [parse(op, shape) for shape in OPS[op].shapes.get(group, smoke).split(", ") if shape]
            found += [spec for spec in specs if spec not in found]
    return found


def build(spec: Spec, device: str) -> Case:
    """Inputs for ``spec``, the same numbers in every process."""
    torch.manual_seed(0)
    tensors, upstream = OPS[spec["op"]].inputs(Draw(spec, device))
    leaves = ("hidden",) if spec.get("frozen") else tuple(OPS[spec["op"]].leaves.split())
    return Case(spec, {n: torch.nn.Parameter(t) if n in leaves else t for n, t in tensors.items()}, leaves, upstream)


def bytes_moved(case: Case) -> dict[str, int] | None:
    """Bytes that a memory-bound op must move, by pass; None where matrix multiplications are the floor."""
    moved = OPS[case.op].moved
    if moved is None:
        return None
    forward, backward = moved({name: case[name].nbytes for name in case.tensors})
    return {"fwd": forward, "bwd": backward, "full": forward + backward}


def gemms(case: Case) -> dict[str, Callable[[], object]]:
    """The matrix multiplications alone, full size, over the tokens that count: ``fwd`` logits, ``full`` all of them."""
    hidden, weight = case["hidden"].detach()[case["labels"] != -100], case["weight"].detach()
    logits = hidden @ weight.T
    grad_hidden = torch.empty_like(hidden)
    grad_weight = None if case.spec["frozen"] else torch.empty_like(weight)

    def forward() -> None:
        torch.mm(hidden, weight.T, out=logits)

    def full() -> None:
        forward()
        torch.mm(logits, weight, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(logits.T, hidden, out=grad_weight)

    return {"fwd": forward, "full": full}


Check = tuple[str, Tensor, Callable[[tuple, dict], Tensor]]  # name, expected in fp32, where to find the actual value


def expected(case: Case) -> list[Check]:
    """The outputs and gradients that the op must give, from the fp32 definition on the same inputs.

    Of an ``[N, V]`` gradient 512 rows are held. Entries that no label points at are a check of their own: beside the
    label's they are so small that their absence would not show.
    """
    if case.op in LOSSES:
        return _expected_loss(case)
    wide = {n: case[n].detach().float().requires_grad_(n in case.leaves) for n in case.tensors}
    outputs = definition(case.op)(*wide.values(), **OPS[case.op].options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.backward(outputs, [u.float() for u in case.upstream if u is not None])
    checks: list[Check] = [(f"output {i}", o.detach(), lambda o, g, i=i: o[i]) for i, o in enumerate(outputs)]
    for name in case.leaves:
        gradient = wide[name].grad
        assert gradient is not None
        checks.append((f"d{name}", gradient, lambda o, g, n=name: g[n]))
    return checks


def _without_label(grad: Tensor, labels: Tensor) -> Tensor:
    return grad.float().scatter(1, labels.clamp(min=0)[:, None], 0.0)


def _expected_loss(case: Case) -> list[Check]:
    """The same from the definition on ``ROW_CHUNK`` rows at a time: all logits in fp32 would not fit."""
    (name, *trained), labels, upstream = case.leaves, case["labels"], case.upstream[0]
    projected, valid, source = name == "hidden", labels != -100, case[name].detach()
    weights = [case["weight"].detach().float().requires_grad_(bool(trained))] if projected else []
    held = torch.linspace(0, len(labels) - 1, len(labels) if projected else min(512, len(labels)))
    held = held.round().long().to(labels.device)
    outputs, gradients = [], []
    torch.set_float32_matmul_precision("high")  # TF32 holds bf16 inputs exactly
    for rows in torch.arange(len(labels), device=labels.device).split(ROW_CHUNK):
        x = source[rows].float().requires_grad_()
        if upstream is None:
            output = definition(case.op)(x, *weights, labels[rows], reduction="sum") / valid.sum()
        else:
            output = definition(case.op)(x, *weights, labels[rows]).log_probs
        output.backward(None if upstream is None else upstream[rows])
        outputs.append(output.detach())
        gradients.append(x.grad[torch.isin(rows, held)])
    torch.set_float32_matmul_precision("highest")
    output = sum(outputs) if upstream is None else torch.cat(outputs)
    gradient = torch.cat(gradients)
    checks: list[Check] = [("output 0", output, lambda o, g: o[0]), (f"d{name}", gradient, lambda o, g: g[name][held])]
    if not projected:
        target = labels[held]
        rest = _without_label(gradient, target)
        checks.append((f"d{name} off label", rest, lambda o, g: _without_label(g[name][held], target)))
    elif trained:
        unseen = torch.ones(len(weights[0]), dtype=torch.bool, device=labels.device)
        unseen[labels[valid]] = False
        rest = unseen.nonzero().squeeze(1)[:4096]
        checks.append(("dweight", weights[0].grad, lambda o, g: g["weight"]))
        if len(rest):
            checks.append(("dweight off label", weights[0].grad[rest], lambda o, g: g["weight"][rest]))
    return checks
