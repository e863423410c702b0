"""Medusa heads: K further heads that predict the tokens after the next one (Cai et al., arXiv 2401.10774).

Head ``k = 1..K`` predicts token ``t + 1 + k`` from the backbone's last hidden state ``h_t``:
``logits_k = W_k block(h)`` with ``block(h) = h + silu(R_k h + b_k)``, one or more blocks. ``R_k`` and ``b_k`` start at
zero and ``W_k`` as the LM's output embedding, so every head starts as the LM's own. The loss is
``[L_LM +] sum_k coefficient * decay^k * L_k`` (paper, section 2.2: ``lambda_k`` is the k-th power of a constant, and
the coefficient is its ``lambda_0``). Stage 1 (Medusa-1) freezes the LM and trains the heads; stage 2 (Medusa-2) trains
both and adds the LM's own loss.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from .medusa_loss import (
    IGNORE_INDEX,
    HeadCall,
    HeadLoss,
    HiddenGradient,
    fused_head_loss,
    open_gate,
    plain_head_loss,
    residual_blocks,
    tie_empty,
)
from .patching import PatchState, patch_state
from .sharding import check_materialized, gathered


@dataclass(frozen=True)
class MedusaConfig:
    """Shape and loss of the heads.

    Args:
        heads: number K of heads, at least 1.
        layers: residual blocks of a head, at least 1.
        coefficient: factor of all heads' losses, above 0.
        decay: factor from one head to the next, in (0, 1].
        stage: 1 trains the heads on a frozen LM, 2 both.

    Raises:
        TypeError, ValueError: an argument of another type or out of range; names it, its value and what is allowed.
    """

    heads: int = 5
    layers: int = 1
    coefficient: float = 0.2
    decay: float = 0.8
    stage: int = 1

    def __post_init__(self):
        for name in ("heads", "layers", "stage"):
            if type(getattr(self, name)) is not int:
                raise TypeError(f"{name} must be an int, got {getattr(self, name)!r}")
        for name in ("coefficient", "decay"):
            if type(getattr(self, name)) not in (int, float):
                raise TypeError(f"{name} must be a float, got {getattr(self, name)!r}")
        for name in ("heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.coefficient < math.inf:
            raise ValueError(f"coefficient must be above 0 and finite, got {self.coefficient}")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, got {self.decay}")
        if self.stage not in (1, 2):
            raise ValueError(f"stage must be 1 (heads on a frozen LM) or 2 (both), got {self.stage}")

    def weight(self, k: int) -> float:
        """The factor of head ``k``'s loss, ``k`` from 1: ``coefficient * decay^k``."""
        return self.coefficient * self.decay**k


class MedusaModelConfig(PreTrainedConfig):
    """``config.json`` of a ``MedusaModel``: in ``medusa`` a ``MedusaConfig``'s fields, in ``text_config`` the LM's."""

    model_type = "medusa"
    # The type of an LM whose config does not say it; those that transformers writes do.
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(AutoConfig, model_type="llama")}
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "lm_loss", "head_losses"]

    text_config: dict | PreTrainedConfig | None = None
    medusa: dict[str, Any] | None = None
    tie_word_embeddings: bool = False  # the LM's own config says whether it ties its embeddings


@dataclass
class MedusaOutput(ModelOutput):
    """What ``MedusaModel`` returns.

    Args:
        loss: 0-d, to train on.
        logits: the LM's, ``[B, T, V]``, in stage 2; empty or lazy as ``apply_liger`` makes them.
        lm_loss: 0-d, detached: the LM's own, in stage 2.
        head_losses: ``[K]``, detached: each head's cross-entropy without its weight in the sum.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    lm_loss: Tensor | None = None
    head_losses: Tensor | None = None


class MedusaHead(nn.Module):
    """One head. Its parameters are its own, not those of submodules, so that sharded engines gather them at its call.

    Args:
        embedding: the LM's output embedding ``[V, H]``, which the head's projection starts as.
        layers: number of residual blocks.
    """

    def __init__(self, embedding: Tensor, layers: int):
        super().__init__()
        rows = layers * embedding.shape[1]
        self.residual_weight = nn.Parameter(embedding.new_zeros(rows, embedding.shape[1]))
        self.residual_bias = nn.Parameter(embedding.new_zeros(rows))
        self.weight = nn.Parameter(embedding.detach().clone())

    def forward(self, hidden: Tensor, gate: Tensor | None, call: HeadCall) -> Tensor:
        """Put this head's share of the loss in ``call.loss``; returns the empty tensor of ``tie_empty``.

        ``hidden`` is ``[B, T, H]``; ``gate`` that of ``fused_head_loss``.
        """
        parameters = [self.residual_weight, self.residual_bias, self.weight]
        if call.head_loss is None:
            for name, parameter in self.named_parameters():
                check_materialized(f"{type(self).__name__}.{name}", parameter)
            loss = fused_head_loss(hidden, gate, call, parameters)
        else:
            x = residual_blocks(hidden, *parameters[:2])
            loss = call.head_loss(x.flatten(0, -2), self.weight, call.labels.flatten()) / call.num_items
        call.loss, empty = tie_empty(loss, hidden.dtype)
        return empty


class MedusaHeads(nn.ModuleList):
    """The ``config.heads`` heads of an LM with the output embedding ``embedding`` ``[V, H]``."""

    def __init__(self, embedding: Tensor, config: MedusaConfig):
        super().__init__(MedusaHead(embedding, config.layers) for _ in range(config.heads))
        self.config = config

    def forward(
        self, hidden: Tensor, labels: Tensor, num_items: Tensor | float, head_loss: HeadLoss | None, options: dict
    ) -> tuple[Tensor, Tensor]:
        """The weighted sum of the heads' losses, and each head's loss.

        Args:
            hidden: ``[B, T, H]``, the backbone's last hidden states.
            labels: ``[B, T]``, not shifted, -100 where a token bears no loss. Head ``k`` at ``t`` is compared with
                ``labels[:, t + 1 + k]``; a row too short for a head adds nothing to its loss.
            num_items: what each head's sum of cross-entropies is divided by.
            head_loss, options: as in ``HeadCall``.

        Returns:
            fp32, 0-d and detached ``[K]``.
        """
        gate = shared = None
        if head_loss is None and torch.is_grad_enabled() and hidden.requires_grad:
            shared = HiddenGradient(hidden)
            gate = open_gate(hidden, shared)
        hidden = hidden.detach() if head_loss is None else hidden
        total, losses = 0.0, []
        for k, head in enumerate(self, 1):
            weight = self.config.weight(k)
            call = HeadCall(shifted_labels(labels, k), num_items / weight, head_loss, options, shared)
            empty = head(hidden, gate, call)
            total = total + call.loss + empty.sum()
            losses.append(call.loss.detach() / weight)
        return total, torch.stack(losses)


def shifted_labels(labels: Tensor, k: int) -> Tensor:
    """``labels`` ``[B, T]`` aligned with head ``k``: position t holds label ``t + 1 + k``, or -100 past the end."""
    kept = labels[:, 1 + k :]
    return F.pad(kept, (0, labels.shape[1] - kept.shape[1]), value=IGNORE_INDEX)


class MedusaModel(PreTrainedModel):
    """A causal LM (``lm``) with Medusa heads (``medusa_heads``), trained by the stock Trainer.

    ``apply_liger`` and ``use_liger`` patch the LM inside, and the heads' losses are then fused too: their memory does
    not grow with the number of heads but for the parameters and their gradients. Every loss of a batch is divided by
    the same number, as transformers does for the LM: ``num_items_in_batch``, else the labels that count for the LM
    in this call. So micro-batches add up to the large batch exactly, and a head that lacks the last k labels of each
    row has a slightly smaller loss than its own mean would be.

    The heads see rows as they are: in packed rows the last k positions of a text learn from the text after it.

    Args:
        config: with ``text_config`` and ``medusa``.
        lm: the causal LM. ``None``: random weights from ``config.text_config``.
        head_loss: sum of cross-entropies from ``(hidden [N, H], weight [V, H], labels [N])``, by ordinary autograd,
            in the place of the choice above: ``plain_head_loss``, or another package's op to compare with.

    Raises:
        ValueError: an ``lm`` without output embeddings, or whose backbone cannot be told from its head.
    """

    config_class = MedusaModelConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    wraps_causal_lm = True  # patching goes on to the LM inside
    _no_split_modules = ("MedusaHead",)
    # Attention is the LM's business.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MedusaModelConfig, lm: PreTrainedModel | None = None, head_loss: HeadLoss | None = None):
        super().__init__(config)
        self.medusa = MedusaConfig(**config.medusa)
        self.head_loss = head_loss
        self.loss_type = "ForCausalLM"  # the Trainer counts labels[..., 1:]
        self.lm = AutoModelForCausalLM.from_config(config.text_config) if lm is None else lm
        if self.lm.get_output_embeddings() is None or self.lm.base_model is self.lm:
            raise ValueError(f"lm must be a causal LM with a backbone and output embeddings, got {type(lm).__name__}")
        with gathered(self.lm.get_output_embeddings().weight) as (embedding,):
            self.medusa_heads = MedusaHeads(embedding, self.medusa)
        self._freeze()
        self.post_init()

    def _freeze(self):
        if self.medusa.stage == 1:
            self.lm.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> "MedusaModel":
        """As in transformers, from what ``save_model`` or ``save_pretrained`` wrote."""
        made = super().from_pretrained(*args, **kwargs)
        (made[0] if isinstance(made, tuple) else made)._freeze()  # loading makes new parameters
        return made

    @classmethod
    def from_causal_lm(
        cls, lm: PreTrainedModel, medusa: MedusaConfig, head_loss: HeadLoss | None = None
    ) -> "MedusaModel":
        """``lm``, which becomes part of the result, with new heads in its dtype and on its device.

        Raises:
            TypeError: ``lm`` is no transformers model.
            ValueError: as in the class.
        """
        if not isinstance(lm, PreTrainedModel):
            raise TypeError(f"lm must be a transformers PreTrainedModel, got {type(lm).__name__}")
        config = MedusaModelConfig(
            text_config=lm.config,
            medusa=asdict(medusa),
            dtype=lm.dtype,
            attn_implementation={"text_config": lm.config._attn_implementation},  # or these two would unset the LM's
            experts_implementation={"text_config": lm.config._experts_implementation},
        )
        return cls(config, lm, head_loss).train(lm.training)

    def init_weights(self):
        """Tie what the LM ties: its weights and the heads' have been made by now."""
        self.tie_weights(recompute_mapping=False)

    def get_input_embeddings(self) -> nn.Module:
        """The LM's."""
        return self.lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LM's; accelerate puts tied embeddings in one FSDP2 unit by these two."""
        return self.lm.get_output_embeddings()

    def train(self, mode: bool = True) -> "MedusaModel":
        """Training or evaluation mode; a frozen LM stays in the latter, without dropout and checkpointing."""
        super().train(mode)
        if self.medusa.stage == 1:
            self.lm.eval()
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> MedusaOutput:
        """The training loss of heads and, in stage 2, LM.

        Args:
            input_ids, attention_mask: ``[B, T]``, as the LM takes them.
            labels: ``[B, T]``, not shifted, -100 where a token bears no loss.
            num_items_in_batch: divisor of the losses' sums: the labels that count in all micro-batches of all ranks.
            kwargs: for the LM.

        Raises:
            ValueError: no ``labels``, or ``shift_labels``, of which no head's labels can be made.
        """
        if labels is None:
            raise ValueError("labels: MedusaModel computes training losses and needs them; for logits, call its `lm`")
        if kwargs.get("shift_labels") is not None:
            raise ValueError("shift_labels: each head shifts the labels differently, so pass `labels` alone")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **kwargs}
        if self.medusa.stage == 1:
            with torch.no_grad():
                hidden, lm_output = self.lm.base_model(**inputs).last_hidden_state, None
        else:
            if num_items_in_batch is not None:
                inputs["num_items_in_batch"] = num_items_in_batch
            hidden, lm_output = self._hidden_and_output(**inputs, labels=labels)
        labels = labels.to(hidden.device)
        head_loss, options = self._how()
        loss, head_losses = self.medusa_heads(hidden, labels, _divisor(num_items_in_batch, labels), head_loss, options)
        if lm_output is None:
            return MedusaOutput(loss=loss, head_losses=head_losses)
        return MedusaOutput(
            loss=lm_output.loss + loss,
            logits=lm_output.logits,
            lm_loss=lm_output.loss.detach(),
            head_losses=head_losses,
        )

    def _hidden_and_output(self, **inputs):
        """The backbone's last hidden states, caught on their way to ``lm_head``, and the LM's output."""
        caught = []
        hook = self.lm.base_model.register_forward_hook(lambda _, args, out: caught.append(out.last_hidden_state))
        try:
            output = self.lm(**inputs)
        finally:
            hook.remove()
        return caught[0], output

    def _how(self) -> tuple[HeadLoss | None, dict]:
        """The heads' loss, ``None`` for the fused one, and the latter's options."""
        state: PatchState | None = patch_state(self)
        if self.head_loss is not None:
            return self.head_loss, {}
        if state is None or not state.config.fused_loss:
            return plain_head_loss, {}
        if state.fused is not None and self.medusa.stage == 1:
            state.fused.calls_fused += 1  # or a callback would report that no fused loss was used: lm_head does not run
        return None, {"logits_budget_mib": state.config.logits_budget_mib, "low_memory": state.config.low_memory}

    def export(self, directory: str | Path) -> None:
        """Write the LM as plain transformers loads it, and the heads beside it as ``medusa_lm_head.safetensors``.

        The heads' file has the tensor names of the paper's released ones: ``{k}.{layer}.linear.weight`` and ``.bias``
        for the blocks, ``{k}.{layers}.weight`` for the projection, ``k`` from 0. For a model whose weights are whole:
        after sharded training, load what ``save_model`` wrote with ``from_pretrained`` first.
        """
        self.lm.save_pretrained(directory)
        tensors = {}
        for k, head in enumerate(self.medusa_heads):
            check_materialized(f"medusa_heads.{k}.weight", head.weight)
            width = head.weight.shape[1]
            for layer in range(self.medusa.layers):
                rows = slice(layer * width, (layer + 1) * width)
                tensors[f"{k}.{layer}.linear.weight"] = head.residual_weight[rows].detach().contiguous()
                tensors[f"{k}.{layer}.linear.bias"] = head.residual_bias[rows].detach().contiguous()
            tensors[f"{k}.{self.medusa.layers}.weight"] = head.weight.detach().contiguous()
        save_file(tensors, Path(directory) / "medusa_lm_head.safetensors", metadata={"format": "pt"})


def _divisor(num_items: Tensor | int | None, labels: Tensor) -> Tensor | int:
    """What the heads' sums are divided by, at least 1: without a label the loss is 0, whatever it is divided by."""
    if num_items is None:
        return (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
    if torch.is_tensor(num_items):
        return num_items.to(labels.device).clamp(min=1)
    return max(num_items, 1)
