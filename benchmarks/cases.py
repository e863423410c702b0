"""One op at one shape: its inputs, what it should compute, and the bytes or multiply-adds it cannot do without."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from liger_trainer.kernels import reference

EPS = 1e-6
ROW_CHUNK = 1024  # rows of fp32 logits the check holds at a time
LOSSES = ("cross_entropy", "linear_cross_entropy", "linear_logprobs")


@dataclass
class Case:
    """Random inputs of one op. ``leaves`` names those that get gradients; ``upstream`` has one gradient per output."""

    spec: dict
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]
    upstream: tuple[Tensor | None, ...] = (None,)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    @property
    def op(self) -> str:
        """The op's name."""
        return self.spec["op"]

    def leaf_tensors(self) -> list[Tensor]:
        """The inputs that get gradients."""
        return [self.tensors[name] for name in self.leaves]


def _heads(spec: dict, heads: int, device: str, dtype: torch.dtype) -> Tensor:
    # transformers gives the rotary embedding a transposed view of the projection's [B, T, H, D] output
    return torch.randn(spec["batch"], spec["seq"], heads, spec["head_dim"], device=device, dtype=dtype).transpose(1, 2)


def _labels(count: int, vocab: int, ignored: float, device: str) -> Tensor:
    labels = torch.randint(vocab, (count,), device=device)
    return labels.masked_fill(torch.rand(count, device=device) < ignored, -100) if ignored else labels


def build(spec: dict, device: str) -> Case:
    """Inputs for ``spec``, the same numbers in every process."""
    torch.manual_seed(0)
    op, dtype = spec["op"], getattr(torch, spec["dtype"])

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    if op == "rope":
        q, k = (_heads(spec, spec[n], device, dtype) for n in ("q_heads", "kv_heads"))
        pairs = torch.arange(0, spec["head_dim"], 2, device=device) / spec["head_dim"]
        angles = torch.outer(torch.arange(spec["seq"], device=device).float(), 500000.0**-pairs).repeat(1, 2)
        tensors = {"q": q, "k": k, "cos": angles.cos().to(dtype)[None], "sin": angles.sin().to(dtype)[None]}
        leaves, upstream = ("q", "k"), tuple(_heads(spec, spec[n], device, dtype) for n in ("q_heads", "kv_heads"))
    elif op.startswith("linear"):
        count, hidden, vocab = spec["tokens"], spec["hidden"], spec["vocab"]
        # A mean in hidden states and weights, as models have: without it the softmax part of the gradients
        # averages to nothing, and a kernel that dropped it would pass the check.
        tensors = {
            "hidden": normal(count, hidden) + normal(hidden) / 2,
            "weight": (normal(vocab, hidden) + normal(hidden)) * (2 * hidden**-0.5),
            "labels": _labels(count, vocab, spec["ignored"], device),
        }
        leaves = ("hidden",) if spec["frozen"] else ("hidden", "weight")
        upstream = (torch.randn(count, device=device) / count if op == "linear_logprobs" else None,)
    else:
        rows, cols = spec["rows"], spec["cols"]
        match op:
            case "cross_entropy":
                tensors = {
                    "logits": normal(rows, cols) * 2,
                    "labels": _labels(rows, cols, spec.get("ignored", 0.0), device),
                }
                leaves, upstream = ("logits",), (None,)
            case "swiglu" | "geglu":
                tensors = {"gate": normal(rows, cols), "up": normal(rows, cols)}
                leaves, upstream = ("gate", "up"), (normal(rows, cols),)
            case "clamped_swiglu":  # in turns, as GPT-OSS has them; some beyond the limit
                tensors = {"gate_up": normal(rows, 2 * cols) * 4}
                leaves, upstream = ("gate_up",), (normal(rows, cols),)
            case _:
                tensors = {"x": normal(rows, cols), "weight": 1 + normal(cols) / 4}
                upstream = (normal(rows, cols),)
                if op == "add_rms_norm":
                    tensors["residual"] = normal(rows, cols)
                    upstream = (*upstream, normal(rows, cols))
                if op == "layer_norm":
                    tensors["bias"] = normal(cols)
                leaves = tuple(tensors)
    for name in leaves:
        tensors[name] = torch.nn.Parameter(tensors[name])
    return Case(spec, tensors, leaves, upstream)


def bytes_moved(case: Case) -> dict[str, int] | None:
    """Bytes a memory-bound op must move in forward and in backward: each input read once, each output written once.

    Row statistics are left out. ``None`` for the ops whose floor is matrix multiplication.
    """
    if case.op.startswith("linear"):
        return None
    size = {name: t.numel() * t.element_size() for name, t in case.tensors.items()}
    match case.op:
        case "rope":
            once = 2 * size["q"] + 2 * size["k"] + size["cos"] + size["sin"]
            return {"fwd": once, "bwd": once}
        case "cross_entropy":
            return {"fwd": size["logits"], "bwd": 2 * size["logits"]}
        case "swiglu" | "geglu":
            return {"fwd": 3 * size["gate"], "bwd": 5 * size["gate"]}
        case "clamped_swiglu":
            return {"fwd": size["gate_up"] * 3 // 2, "bwd": size["gate_up"] * 5 // 2}
        case "add_rms_norm":  # both inputs have the same gradient: written once
            return {"fwd": 4 * size["x"] + size["weight"], "bwd": 4 * size["x"] + 2 * size["weight"]}
        case _:
            affine = size["weight"] + size.get("bias", 0)
            return {"fwd": 2 * size["x"] + affine, "bwd": 3 * size["x"] + size["weight"] + affine}


def gemms(case: Case) -> dict[str, Callable[[], object]]:
    """The matrix multiplications alone, full size, over the tokens that count: ``fwd`` logits; ``full`` all of them."""
    hidden, weight = case["hidden"].detach()[case["labels"] != -100], case["weight"].detach()
    logits = hidden @ weight.T
    grad_hidden = torch.empty_like(hidden)
    grad_weight = None if case.spec["frozen"] else torch.empty_like(weight)

    def forward():
        torch.mm(hidden, weight.T, out=logits)

    def full():
        forward()
        torch.mm(logits, weight, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(logits.T, hidden, out=grad_weight)

    return {"fwd": forward, "full": full}


Check = tuple[str, Tensor, Callable[[tuple, dict], Tensor]]  # name, expected in fp32, where to find the actual value


def expected(case: Case) -> list[Check]:
    """What the op must return and the gradients it must give, from the fp32 definition on the same inputs.

    Of an ``[N, V]`` gradient 512 rows are held. Entries that no label points at are a check of their own: beside the
    label's they are so small that their absence would not show.
    """
    if case.op in LOSSES:
        return _expected_loss(case)
    wide = {n: t.detach().float().requires_grad_(n in case.leaves) for n, t in case.tensors.items()}
    match case.op:
        case "rope":
            outputs = reference.rope(wide["q"], wide["k"], wide["cos"], wide["sin"])
        case "rms_norm":
            outputs = (reference.rms_norm(wide["x"], wide["weight"], EPS),)
        case "add_rms_norm":
            outputs = reference.add_rms_norm(wide["x"], wide["residual"], wide["weight"], EPS)
        case "layer_norm":
            outputs = (reference.layer_norm(wide["x"], wide["weight"], wide["bias"], EPS),)
        case "swiglu":
            outputs = (reference.swiglu(wide["gate"], wide["up"]),)
        case "geglu":
            outputs = (reference.geglu(wide["gate"], wide["up"]),)
        case "clamped_swiglu":
            outputs = (reference.clamped_swiglu(wide["gate_up"], interleaved=True),)
    torch.autograd.backward(outputs, [u.float() for u in case.upstream])
    checks: list[Check] = [(f"output {i}", o.detach(), lambda o, g, i=i: o[i]) for i, o in enumerate(outputs)]
    checks += [(f"d{n}", wide[n].grad, lambda o, g, n=n: g[n]) for n in case.leaves]
    return checks


def _without_label(grad: Tensor, labels: Tensor) -> Tensor:
    return grad.float().scatter(1, labels.clamp(min=0)[:, None], 0.0)


def _expected_loss(case: Case) -> list[Check]:
    labels = case["labels"]
    valid = labels != -100
    coefficient = valid / valid.sum() if case.upstream[0] is None else -case.upstream[0] * valid
    projected = case.op.startswith("linear")
    source = case["hidden" if projected else "logits"].detach()
    weight = case["weight"].detach().float() if projected else None
    sample = torch.linspace(0, len(labels) - 1, min(512, len(labels)), device=labels.device).long()
    log_probs, grad_hidden, sampled = [], [], []
    grad_weight = torch.zeros_like(weight) if "weight" in case.leaves else None
    torch.set_float32_matmul_precision("high")  # TF32 holds bf16 inputs exactly
    for start in range(0, len(labels), ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        chunk, target = source[rows].float(), labels[rows].clamp(min=0)[:, None]
        grad = (chunk @ weight.T if projected else chunk).log_softmax(-1)
        log_probs.append(grad.gather(1, target).squeeze(1))
        grad = grad.exp().scatter_add_(1, target, torch.full_like(target, -1, dtype=grad.dtype))
        grad *= coefficient[rows, None]
        if not projected:
            sampled.append(grad[sample[(sample >= start) & (sample < start + ROW_CHUNK)] - start])
            continue
        grad_hidden.append(grad @ weight)
        if grad_weight is not None:
            grad_weight.addmm_(grad.T, chunk)
    torch.set_float32_matmul_precision("highest")
    log_probs = torch.cat(log_probs).where(valid, 0.0)
    output = log_probs if case.op == "linear_logprobs" else -log_probs.sum() / valid.sum()
    checks: list[Check] = [("output 0", output, lambda o, g: o[0])]
    if not projected:
        grad = torch.cat(sampled)
        checks += [
            ("dlogits", grad, lambda o, g: g["logits"][sample]),
            (
                "dlogits off label",
                _without_label(grad, labels[sample]),
                lambda o, g: _without_label(g["logits"][sample], labels[sample]),
            ),
        ]
        return checks
    checks.append(("dhidden", torch.cat(grad_hidden), lambda o, g: g["hidden"]))
    if grad_weight is not None:
        unseen = torch.ones(len(weight), dtype=torch.bool, device=labels.device)
        unseen[labels[valid]] = False
        rest = unseen.nonzero().squeeze(1)[:4096]
        checks.append(("dweight", grad_weight, lambda o, g: g["weight"]))
        if len(rest):
            checks.append(("dweight off label", grad_weight[rest], lambda o, g: g["weight"][rest]))
    return checks
