"""Medusa heads: K further heads that predict the tokens after the next one (Cai et al., arXiv 2401.10774).

Head ``k = 1..K`` predicts token ``t + 1 + k`` from the backbone's last hidden state ``h_t``:
``logits_k = W_k block(h)`` with ``block(h) = h + silu(R_k h + b_k)``, one or more blocks. ``R_k`` and ``b_k`` start at
zero and ``W_k`` as the LM's output embedding, so every head starts as the LM's own. The loss is
``[L_LM +] sum_k coefficient * decay^k * L_k`` (paper, section 2.2: ``lambda_k`` is the k-th power of a constant, and
the coefficient is its ``lambda_0``). Stage 1 (Medusa-1) freezes the LM and trains the heads; stage 2 (Medusa-2) trains
both and adds the LM's own loss.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from ..head.form import HeadForm, probe_head
from ..patching import PatchState, patch_state
from ..probing.sharding import check_materialized, gathered
from .heads import MedusaConfig, MedusaHeads
from .loss import IGNORE_INDEX, HeadLoss, plain_head_loss


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


class MedusaModel(PreTrainedModel):
    """A causal LM (``lm``) with Medusa heads (``medusa_heads``), trained by the stock Trainer.

    ``apply_liger`` and ``use_liger`` patch the LM inside, and the heads' losses are then fused too: their memory does
    not grow with the number of heads but for the parameters and their gradients. Every loss of a batch is divided by
    the same number, as transformers does for the LM: ``num_items_in_batch``, else the labels that count for the LM
    in this call. So micro-batches add up to the large batch exactly, and a head that lacks the last k labels of each
    row has a slightly smaller loss than its own mean would be.

    The heads see rows as they are: in packed rows the last k positions of a text learn from the text after it.
    Logit scale and soft-cap of the LM are the heads' too. PEFT's ``modules_to_save`` takes no list of modules, so name
    the heads one by one there: ``["medusa_heads.0", "medusa_heads.1"]``.

    Args:
        config: with ``text_config`` and ``medusa``.
        lm: the causal LM. ``None``: random weights from ``config.text_config``.
        head_loss: sum of cross-entropies from ``(hidden [N, H], weight [V, H], labels [N])``, by ordinary autograd,
            in the place of the choice above: another package's op to compare with, say. Not for an LM with a logit
            scale or soft-cap, of which it is not told.

    Raises:
        ValueError: a ``config`` that is no Medusa model's; an ``lm`` without output embeddings, with a bias there,
            or whose backbone cannot be told from its head; in ``forward``, ``from_causal_lm`` and
            ``from_pretrained`` also one that does more to its logits than to scale and soft-cap them.
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
        if config.medusa is None:
            raise ValueError(
                f"config.medusa must be the settings of Medusa heads, got None: {config.name_or_path or 'the config'} "
                "has none. If it is a causal LM's, make heads for it: "
                "MedusaModel.from_causal_lm(AutoModelForCausalLM.from_pretrained(...), MedusaConfig(...))"
            )
        self.medusa = MedusaConfig(**config.medusa)
        self.head_loss = head_loss
        self.loss_type = "ForCausalLM"  # the Trainer counts labels[..., 1:]
        self.lm = AutoModelForCausalLM.from_config(config.text_config) if lm is None else lm
        self._form: HeadForm | None = None
        head = self.lm.get_output_embeddings()
        if head is None or self.lm.base_model is self.lm:
            raise ValueError(f"lm must be a causal LM with a backbone and output embeddings, got {type(lm).__name__}")
        if getattr(head, "bias", None) is not None:
            raise ValueError(f"lm: output embeddings must have no bias, as heads have none, got {type(lm).__name__}'s")
        with gathered(head.weight) as (embedding,):
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
        model = made[0] if isinstance(made, tuple) else made
        model._freeze()  # loading makes new parameters
        model._find_form()
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
        model = cls(config, lm, head_loss).train(lm.training)
        model._find_form()
        return model

    def init_weights(self):
        """Tie what the LM ties: its weights and the heads' have been made by now."""
        self.tie_weights(recompute_mapping=False)

    def get_input_embeddings(self) -> nn.Module:
        """The LM's."""
        return self.lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The LM's; accelerate puts tied embeddings in one FSDP2 unit by these two."""
        return self.lm.get_output_embeddings()

    def resize_token_embeddings(self, *args, **kwargs):
        """Not supported: resize the LM's before heads are made of them."""
        raise NotImplementedError(
            "MedusaModel: heads keep the size of the embeddings that they were made of; "
            "call lm.resize_token_embeddings before MedusaModel.from_causal_lm(lm, ...)"
        )

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
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> MedusaOutput:
        """The training loss of heads and, in stage 2, LM.

        Args:
            input_ids, attention_mask, position_ids: ``[B, T]``, as the LM takes them.
            inputs_embeds: ``[B, T, H]``, in the place of ``input_ids``.
            labels: ``[B, T]``, not shifted, -100 where a token bears no loss.
            num_items_in_batch: divisor of the losses' sums: the labels that count in all micro-batches of all ranks.
            kwargs: for the LM. The Trainer drops a dataset's columns that are no named arguments here: with others
                that the LM takes, set ``remove_unused_columns=False``.

        Raises:
            ValueError: no ``labels``, or ``shift_labels``, of which no head's labels can be made; an LM or
                ``head_loss`` as in the class.
        """
        if labels is None:
            raise ValueError("labels: MedusaModel computes training losses and needs them; for logits, call its `lm`")
        if kwargs.get("shift_labels") is not None:
            raise ValueError("shift_labels: each head shifts the labels differently, so pass `labels` alone")
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False, **kwargs}
        optional = {"position_ids": position_ids, "inputs_embeds": inputs_embeds}  # not of every LM
        inputs |= {name: tensor for name, tensor in optional.items() if tensor is not None}
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
        if head_loss is None and self.medusa.stage == 1 and (fused := patch_state(self).fused) is not None:
            fused.calls_fused += 1  # or a callback would report that no fused loss was used: lm_head does not run
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
        """The heads' loss, ``None`` for the fused one, and its options."""
        if self._form is None:
            self._find_form()
        transform = {"logit_scale": self._form.logit_scale, "softcap": self._form.softcap}
        if self.head_loss is not None:
            if transform != {"logit_scale": 1.0, "softcap": None}:
                raise ValueError(f"head_loss must be None for {type(self.lm).__name__}: its logits have {transform}")
            return self.head_loss, {}
        state: PatchState | None = patch_state(self)
        if state is None or not state.config.fused_loss:
            return plain_head_loss, transform
        return None, transform | state.config.options_of("fused_loss")

    @torch.compiler.disable
    def _find_form(self):
        """Find out what the LM does to its logits. Not in ``__init__``, where engines may change how tensors are made.

        Raises:
            ValueError: more than a scale and a soft-cap, or it cannot be found out.
        """
        head = self.lm.get_output_embeddings()
        name = next(name for name, module in self.lm.named_modules() if module is head)
        with torch.device("cpu"):
            form = probe_head(self.lm, name, head)
        if isinstance(form, str):
            raise ValueError(f"lm: Medusa heads cannot treat their logits as {type(self.lm).__name__} does: {form}")
        self._form = form

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
