"""What users pass to a causal LM and read from its result: batches, and the ways of reading logits."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from model_pair import core_of
from torch import Tensor, nn

IDS = 100  # below every vocabulary size that a model is resized to
PADDINGS = ("none", "right", "left", "mixed")
LABELS = ("some", "none", "ignored", "at padding", "first token")
STYLES = ("keywords", "positional", "tuple")
EXTRAS = (
    "none", "num_items tensor", "num_items int", "logits_to_keep 1", "logits_to_keep 3", "logits_to_keep index",
    "shift_labels", "ignore_index", "inputs_embeds", "position_ids", "no cache", "hidden states", "no mask",
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """One call of a model: which padding and labels, one further argument, and how arguments and result are passed."""

    padding: str = "none"
    labels: str = "some"
    extra: str = "none"
    style: str = "keywords"
    seed: int = 0

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """The keyword arguments of the call."""
        random = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(3, IDS, (2, 6), generator=random)
        mask = torch.ones_like(ids)
        if self.padding in ("right", "mixed"):
            mask[0, 4:] = 0
        if self.padding in ("left", "mixed"):
            mask[1, :2] = 0
        labels = self._labels(ids, mask, random)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        inputs |= self._further(model, ids, labels)
        if self.extra == "inputs_embeds":
            inputs["inputs_embeds"] = core_of(model).get_input_embeddings()(inputs.pop("input_ids"))
        absent = "attention_mask" if self.extra == "no mask" else None
        return {name: value for name, value in inputs.items() if value is not None and name != absent}

    def _labels(self, ids: Tensor, mask: Tensor, random: torch.Generator) -> Tensor | None:
        if not self.has_labels:
            return None
        hidden = torch.rand(ids.shape, generator=random) < 0.3
        if self.labels != "at padding":
            hidden |= mask == 0
        if self.labels in ("ignored", "first token"):
            hidden |= torch.ones_like(mask, dtype=torch.bool)
        labels = ids.masked_fill(hidden, int(ids[0, 3]) if self.extra == "ignore_index" else -100)
        if self.labels == "first token":  # which the shift leaves out
            labels[:, 0] = ids[:, 0]
        return labels

    def _further(self, model: nn.Module, ids: Tensor, labels: Tensor | None) -> dict[str, Any]:
        shifted = None if labels is None else F.pad(labels[:, 1:], (0, 1), value=-100).roll(1, 0)
        return {
            "num_items tensor": {"num_items_in_batch": torch.tensor(7)},
            "num_items int": {"num_items_in_batch": 7},
            "logits_to_keep 1": {"logits_to_keep": 1},
            "logits_to_keep 3": {"logits_to_keep": 3},
            "logits_to_keep index": {"logits_to_keep": torch.tensor([1, 4])},
            "shift_labels": {"shift_labels": shifted},
            "ignore_index": {"ignore_index": int(ids[0, 3])},
            "position_ids": {"position_ids": torch.arange(ids.shape[1]).expand_as(ids) + 2},
            "no cache": {"use_cache": False},
            "hidden states": {"output_hidden_states": True},
        }.get(self.extra, {})

    @property
    def has_labels(self) -> bool:
        """Whether the call has labels: with ``logits_to_keep`` they would be an error of every model."""
        return self.labels != "none" and not self.extra.startswith("logits_to_keep")

    @property
    def has_no_valid_label(self) -> bool:
        """Whether the loss is a mean over nothing: 0 with the fused loss and NaN without, as docs/limits.md says."""
        return self.labels in ("ignored", "first token")

    def call(self, model: nn.Module) -> tuple[Tensor | None, Tensor]:
        """One forward: the loss (None without labels) and the logits as the model returned them."""
        return self.results(self.output(model))

    def output(self, model: nn.Module) -> Any:
        """One forward: whatever the model returns."""
        inputs = self.inputs(model)
        if self.style == "tuple":
            return model(**inputs, return_dict=False)
        if self.style == "keywords":
            return model(**inputs)
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        names = names[: 1 + max(names.index(n) for n in inputs if n in names and n != "logits_to_keep")]
        return model(*[inputs.pop(name, None) for name in names], **inputs)

    def results(self, output: Any) -> tuple[Tensor | None, Tensor]:
        """Loss and logits of what a model returned."""
        if not isinstance(output, tuple):
            return output.loss, output.logits
        logits = next(value for value in output if torch.is_tensor(value) and value.ndim == 3)
        return output[0] if self.has_labels else None, logits


def _in_place(logits: Tensor) -> Tensor:
    logits.mul_(2)
    return logits.float()


def _divided(logits: Tensor) -> Tensor:
    warm = logits / 2
    logits.zero_()
    return warm.float()


def _masked(logits: Tensor) -> Tensor:
    logits[..., :5] = -1e4
    return logits.float()


def _saved(logits: Tensor) -> Tensor:
    buffer = io.BytesIO()
    torch.save(logits, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _dlpack(logits: Tensor) -> Tensor:
    if type(logits) is not Tensor and type(logits).__dlpack__ is Tensor.__dlpack__:
        raise TypeError(f"DLPack would read the memory of a {type(logits).__name__}, which may have none, and crash")
    return torch.from_dlpack(logits).clone()


READERS: dict[str, Callable[[Tensor], Any]] = {
    "clone": lambda x: x.clone(),
    "float": lambda x: x.float(),
    "numpy": lambda x: torch.tensor(x.float().numpy()),
    "slice": lambda x: x[:, -1, :].clone(),
    "softmax": lambda x: x.softmax(-1),
    "item": lambda x: x.abs().sum().item(),
    "list": lambda x: torch.tensor(x.tolist()),
    "into": lambda x: torch.empty_like(x).copy_(x),
    "out": lambda x: torch.add(x, 1, out=torch.empty(x.shape, dtype=x.dtype)),
    "in place": _in_place,
    "divided": _divided,
    "masked": _masked,
    "deepcopy": lambda x: copy.deepcopy(x).clone(),
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": _saved,
    "cat": lambda x: torch.cat([x, x]),
    "view": lambda x: x.view(-1, x.shape[-1]).t().contiguous(),
    "own loss": lambda x: F.cross_entropy(x.float().flatten(0, 1), torch.arange(x.shape[0] * x.shape[1])),
    "strides": lambda x: list(x.stride()),
    "equal": lambda x: torch.equal(x, x),
    "gradient": lambda x: x.requires_grad,
    "data": lambda x: x.data.clone(),
    "dlpack": _dlpack,
    "double": lambda x: x.to(torch.float64),
}
