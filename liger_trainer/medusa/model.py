"""A causal LM with K Medusa heads, which predict the tokens after the next one (Cai et al., arXiv 2401.10774).

Head ``k = 1..K`` predicts token ``t + 1 + k`` from the backbone's last hidden state ``h_t``:
``logits_k = W_k block(h)`` with ``block(h) = h + silu(R_k h + b_k)``, one or more blocks. ``R_k`` and ``b_k`` start at
zero and ``W_k`` as a copy of the LM's output embedding, so every head starts as the LM's own head. The loss is
``[L_LM +] sum_k coefficient * decay^k * L_k`` (section 2.2 of the paper: ``lambda_k`` is the k-th power of a constant,
and ``coefficient`` is ``lambda_0``). Stage 1 (Medusa-1) freezes the LM and trains the heads. Stage 2 (Medusa-2) trains
both and adds the LM's own loss.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from ..head.form import HeadForm, probe_head
from ..head.per_thread import Reading, set_reading
from ..head.sharded_weights import check_materialized, gathered
from ..patching import PatchState, patch_state
from ..probing.probe import name_in
from ..probing.rule import Skip
from .heads import MedusaConfig, MedusaHead, MedusaHeads
from .loss import IGNORE_INDEX, HeadLoss, plain_head_loss


class MedusaModelConfig(PreTrainedConfig):
    """The config of a ``MedusaModel``: ``medusa`` has the fields of a ``MedusaConfig``; ``text_config`` is the LM's."""

    model_type = "medusa"
    # The model type if the LM's config has none; configs that transformers writes have one.
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(AutoConfig, model_type="llama")}
    keys_to_ignore_at_inference: ClassVar = ["past_key_values", "lm_loss", "head_losses"]

    text_config: dict | PreTrainedConfig | None = None
    medusa: dict[str, Any] | None = None
    tie_word_embeddings: bool = False  # the LM's own config says whether it ties its embeddings


@dataclass
class MedusaOutput(ModelOutput):
    """The output of ``MedusaModel``.

    Args:
        loss: The training loss, 0-d.
        logits: The LM's logits in stage 2, ``[B, T, V]``; not built after ``apply_liger``.
        lm_loss: The LM's own loss in stage 2, 0-d and detached.
        head_losses: Each head's cross-entropy before weighting, ``[K]`` and detached.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    lm_loss: Tensor | None = None
    head_losses: Tensor | None = None


class MedusaModel(PreTrainedModel):
    """A causal LM (``lm``) with Medusa heads (``medusa_heads``), trained by the stock Trainer.

    ``apply_liger`` and ``use_liger`` patch the LM, and the heads' losses are then fused too: except for the parameters
    and their gradients, memory does not grow with the number of heads. All losses of a batch are divided by the same
    number, as transformers does for the LM: ``num_items_in_batch``, or else the number of labels that count for the LM
    in this call. So the micro-batches add up exactly to the large batch. A head lacks the last k labels of each row, so
    its loss is slightly smaller than its own mean would be.

    The heads ignore text boundaries: in packed rows, the last k positions of a text learn from the text after it. The
    heads use the LM's logit scale and soft-cap. PEFT's ``modules_to_save`` does not accept a ``ModuleList``, so name
    each head there: ``["medusa_heads.0", "medusa_heads.1"]``.

    Args:
        config: Has ``text_config`` and ``medusa``.
        lm: The causal LM. ``None``: random weights from ``config.text_config``.
        head_loss: Replaces the heads' loss, for example with another package's op for comparison. Computes the sum of
            cross-entropies from ``(hidden [N, H], weight [V, H], labels [N])`` through ordinary autograd. Not for an LM
            with a logit scale or soft-cap, because it does not receive them.

    Raises:
        ValueError: ``config`` has no Medusa settings, or ``lm`` has no output embeddings, has a bias there, or
            has no separate backbone. ``forward``, ``from_causal_lm`` and ``from_pretrained`` also raise it if the LM
            does more to its logits than scale and soft-cap them.
    """

    config_class = MedusaModelConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    wraps_causal_lm = True  # apply_liger patches the LM
    _no_split_modules: ClassVar = ["MedusaHead"]
    # The LM checks its own attention implementation.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: MedusaModelConfig, lm: PreTrainedModel | None = None, head_loss: HeadLoss | None = None):
        super().__init__(config)
        if config.medusa is None:
            raise ValueError(
                f"config.medusa: got None from {config.name_or_path or 'the config'}; must be the settings of Medusa "
                "heads. To add heads to a causal LM, call "
                "MedusaModel.from_causal_lm(AutoModelForCausalLM.from_pretrained(...), MedusaConfig(...))"
            )
        self.medusa = MedusaConfig(**config.medusa)
        self.head_loss = head_loss
        self.loss_type = "ForCausalLM"  # the Trainer counts labels[..., 1:]
        self.lm = AutoModelForCausalLM.from_config(config.text_config) if lm is None else lm
        self._form: HeadForm | None = None
        head = self.lm.get_output_embeddings()
        if head is None or self.lm.base_model is self.lm:
            raise ValueError(
                f"lm: got {type(self.lm).__name__}; must be a causal LM with a backbone and output embeddings"
            )
        if getattr(head, "bias", None) is not None:
            raise ValueError(
                f"lm: got {type(self.lm).__name__}, whose output embeddings have a bias; must have none, as Medusa "
                "heads have none"
            )
        with gathered(head.weight) as (embedding,):
            self.medusa_heads = MedusaHeads(embedding, self.medusa)
        self._freeze()
        self.post_init()

    def _freeze(self) -> None:
        if self.medusa.stage == 1:
            self.lm.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "MedusaModel":
        """Load what ``save_model`` or ``save_pretrained`` wrote, as in transformers."""
        made: Any = super().from_pretrained(*args, **kwargs)
        model = made if isinstance(made, cls) else made[0]  # a tuple with output_loading_info=True
        model._freeze()  # loading makes new parameters
        model._find_form()
        return made

    @classmethod
    def from_causal_lm(
        cls, lm: PreTrainedModel, medusa: MedusaConfig, head_loss: HeadLoss | None = None
    ) -> "MedusaModel":
        """Add new heads to ``lm``, in its dtype and on its device. ``lm`` becomes part of the result.

        Raises:
            TypeError: ``lm`` is not a transformers model.
            ValueError: As in the class.
        """
        if not isinstance(lm, PreTrainedModel):
            raise TypeError(f"lm: got {type(lm).__name__}; must be a transformers PreTrainedModel")
        settings: dict[str, Any] = {
            "text_config": lm.config,
            "medusa": asdict(medusa),
            "dtype": lm.dtype,
            # Without these two, the LM's own settings would be reset.
            "attn_implementation": {"text_config": lm.config._attn_implementation},
            "experts_implementation": {"text_config": lm.config._experts_implementation},
        }
        model = cls(MedusaModelConfig(**settings), lm, head_loss).train(lm.training)
        model._find_form()
        return model

    def init_weights(self) -> None:
        """Tie the weights that the LM ties. The LM's and the heads' weights are initialised already."""
        self.tie_weights(recompute_mapping=False)

    def get_input_embeddings(self) -> nn.Module:
        """The LM's input embeddings."""
        return self.lm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module | None:
        """The LM's output embeddings. accelerate uses both methods to put tied embeddings in one FSDP2 unit."""
        return self.lm.get_output_embeddings()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Not supported: resize the LM's embeddings before adding heads."""
        raise NotImplementedError(
            "MedusaModel: the heads keep the size of the embeddings they were copied from; "
            "call lm.resize_token_embeddings before MedusaModel.from_causal_lm(lm, ...)"
        )

    def train(self, mode: bool = True) -> "MedusaModel":
        """Set training or evaluation mode. A frozen LM stays in evaluation mode, without dropout and checkpointing."""
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
        **kwargs: Any,
    ) -> MedusaOutput:
        """Compute the training loss of the heads and, in stage 2, of the LM.

        Args:
            input_ids: ``[B, T]``, as for the LM.
            attention_mask: ``[B, T]``, as for the LM.
            position_ids: ``[B, T]``, as for the LM.
            inputs_embeds: ``[B, T, H]``, in place of ``input_ids``.
            labels: ``[B, T]``, not shifted, -100 where a token has no loss.
            num_items_in_batch: Divisor of the losses' sums: the number of labels that count in all micro-batches of all
                ranks.
            kwargs: Further inputs of the LM. The Trainer drops dataset columns that are not named arguments here; set
                ``remove_unused_columns=False`` to keep them.

        Raises:
            ValueError: ``labels`` is missing, or ``shift_labels`` is given, from which no head's labels can be made.
                Also for an LM or a ``head_loss`` as in the class.
        """
        if labels is None:
            raise ValueError(
                "labels: got None; must be given, as MedusaModel computes training losses. For logits, call its `lm`"
            )
        if kwargs.get("shift_labels") is not None:
            raise ValueError(
                "shift_labels: got a tensor; must be None, as each head shifts the labels differently. Pass `labels`"
            )
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        optional = {"position_ids": position_ids, "inputs_embeds": inputs_embeds}  # not every LM takes them
        inputs |= kwargs | {name: tensor for name, tensor in optional.items() if tensor is not None}
        set_reading(Reading(labels, lookahead=1 + len(self.medusa_heads)))
        try:
            if self.medusa.stage == 1:
                with torch.no_grad():
                    hidden, lm_output = self.lm.base_model(**inputs).last_hidden_state, None
            else:
                if num_items_in_batch is not None:
                    inputs["num_items_in_batch"] = num_items_in_batch
                hidden, lm_output = self._hidden_and_output(**inputs, labels=labels)
        finally:
            set_reading(None)
        labels = labels.to(hidden.device)
        head_loss, options = self._head_loss_and_options()
        loss, head_losses = self.medusa_heads(hidden, labels, _divisor(num_items_in_batch, labels), head_loss, options)
        state = patch_state(self)
        if head_loss is None and self.medusa.stage == 1 and state is not None and state.fused is not None:
            state.fused.note_call()  # the heads' fused loss stands for that of lm_head, which does not run
        if lm_output is None:
            return MedusaOutput(loss=loss, head_losses=head_losses)
        return MedusaOutput(
            loss=lm_output.loss + loss,
            logits=lm_output.logits,
            lm_loss=lm_output.loss.detach(),
            head_losses=head_losses,
        )

    def _hidden_and_output(self, **inputs: Any) -> tuple[Tensor, Any]:
        """The backbone's last hidden states, caught on their way to ``lm_head``, and the LM's output."""
        caught: list[Tensor] = []
        hook = self.lm.base_model.register_forward_hook(lambda _, args, out: caught.append(out.last_hidden_state))
        try:
            output = self.lm(**inputs)
        finally:
            hook.remove()
        return caught[0], output

    def _head_loss_and_options(self) -> tuple[HeadLoss | None, dict[str, Any]]:
        """The heads' loss, or ``None`` for the fused one, and its options."""
        form = self._find_form() if self._form is None else self._form
        transform = {"logit_scale": form.logit_scale, "softcap": form.softcap}
        if self.head_loss is not None:
            if transform != {"logit_scale": 1.0, "softcap": None}:
                raise ValueError(
                    f"head_loss: got {self.head_loss!r} for {type(self.lm).__name__}, whose logits have {transform}; "
                    "must be None for such a model"
                )
            return self.head_loss, {}
        state: PatchState | None = patch_state(self)
        if state is None or not state.config.fused_loss:
            return plain_head_loss, transform
        return None, transform | state.config.options_of("fused_loss")

    @torch.compiler.disable()
    def _find_form(self) -> HeadForm:
        """Probe what the LM does to its logits.

        This does not happen in ``__init__``, where engines may change how tensors are made.

        Raises:
            ValueError: The LM does more than scale and soft-cap its logits, or the probe failed.
        """
        head = self.lm.get_output_embeddings()
        assert head is not None, "checked in __init__"
        name = name_in(self.lm, head)
        with torch.device("cpu"):
            try:
                self._form = form = probe_head(self.lm, name, head)
            except Skip as skip:
                raise ValueError(
                    f"lm: Medusa heads cannot treat their logits as {type(self.lm).__name__} does: {skip}"
                ) from skip
        return form

    def export(self, directory: str | Path) -> None:
        """Write the LM for plain transformers, and the heads beside it as ``medusa_lm_head.safetensors``.

        The heads' file has the tensor names of the heads released with the paper: ``{k}.{layer}.linear.weight`` and
        ``.bias`` for the blocks and ``{k}.{layers}.weight`` for the projection, with ``k`` from 0. The model must not
        be sharded: after sharded training, first load with ``from_pretrained`` what ``save_model`` wrote.
        """
        self.lm.save_pretrained(directory)
        tensors: dict[str, Tensor] = {}
        for k, module in enumerate(self.medusa_heads):
            head = cast(MedusaHead, module)
            check_materialized(f"medusa_heads.{k}.weight", head.weight)
            width = head.weight.shape[1]
            for layer in range(self.medusa.layers):
                rows = slice(layer * width, (layer + 1) * width)
                tensors[f"{k}.{layer}.linear.weight"] = head.residual_weight[rows].detach().contiguous()
                tensors[f"{k}.{layer}.linear.bias"] = head.residual_bias[rows].detach().contiguous()
            tensors[f"{k}.{self.medusa.layers}.weight"] = head.weight.detach().contiguous()
        save_file(tensors, Path(directory) / "medusa_lm_head.safetensors", metadata={"format": "pt"})


def _divisor(num_items: Tensor | int | None, labels: Tensor) -> Tensor | int:
    """The divisor of the heads' sums. At least 1: without labels the sum is 0, and so is the loss."""
    if num_items is None:
        return (labels[:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
    if torch.is_tensor(num_items):
        return num_items.to(labels.device).clamp(min=1)
    return max(num_items, 1)
