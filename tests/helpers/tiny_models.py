"""Tiny random causal LMs of many architectures, made from configs: what the patching and training tests run on."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from liger_trainer.rules import PER_BATCH

VOCAB = 131
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Settings that make an architecture show its own traits (scales, soft-caps, tied weights), by model type.
_OWN = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 16, "final_logit_softcapping": 1.5},
    "phi3": {"partial_rotary_factor": 0.5},
    "mixtral": {"num_local_experts": 4, "output_router_logits": True},
    "olmo2": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.25},
    "glm4": {"head_dim": 16},
    "gpt_neox": {},
    "smollm3": {},
    "nanochat": {},  # rotates by the negative angle
    "gptj": {"rotary_dim": 8, "n_inner": 96},  # a table entry for each pair of neighbours
    "codegen": {"rotary_dim": 8, "n_inner": 96},
    "deepseek_v3": {  # pairs come in as neighbours and leave as halves; a dense layer and one of experts
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    },
    "nemotron": {"head_dim": 16},  # layer norms with 1 + weight
}  # fmt: skip
MODEL_TYPES = tuple(_OWN)


def tiny_config(model_type: str, **overrides):
    """A config of ``model_type`` with two narrow layers."""
    return AutoConfig.for_model(model_type, **{**_COMMON, **_OWN.get(model_type, {}), **overrides})


def tiny_model(model_type: str, seed: int = 0, **overrides):
    """A random fp32 model of ``model_type``, the same for the same seed, with norm weights that are not all ones."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(rows: int = 2, tokens: int = 11, seed: int = 1, ignored: float = 0.3) -> dict[str, torch.Tensor]:
    """Random ids with labels of which a share is -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    labels = ids.masked_fill(torch.rand(rows, tokens, generator=generator) < ignored, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


# Ways to write padding into the mask of ``padded_batch``.
SIDES = {
    "right": lambda mask: mask[1, -6:].zero_(),
    "left": lambda mask: mask[1, :6].zero_(),
    "both": lambda mask: (mask[1, :3].zero_(), mask[0, -4:].zero_()),
}


def padded_batch(pad) -> dict[str, torch.Tensor]:
    """A batch with the padding that ``pad(mask)`` writes into its mask; padding has no labels."""
    inputs = batch()
    mask = torch.ones_like(inputs["input_ids"])
    pad(mask)
    return {**inputs, "attention_mask": mask, "labels": inputs["labels"].masked_fill(mask == 0, -100)}


def sdpa_model(model_type: str = "llama", **overrides):
    """``tiny_model`` whose attention is SDPA."""
    return tiny_model(model_type, attn_implementation="sdpa", **overrides)


def loss_and_gradients(model, inputs):
    """Loss of one training forward and every parameter's gradient."""
    model.train()
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def kernels_skipped(report):
    """The skipped records for which ``strict`` raises an error, but for those of eager attention (gemma2)."""
    eager = "its attn_implementation is eager, not sdpa"
    return [record for record in report.skipped if record.kind not in PER_BATCH and record.reason != eager]


def assert_same_training(theirs, ours, tolerance=1e-5):
    """Two results of ``loss_and_gradients`` agree, each gradient relative to its norm."""
    (loss, gradients), (our_loss, our_gradients) = theirs, ours
    torch.testing.assert_close(our_loss, loss, rtol=tolerance, atol=1e-7)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        error = (our_gradients[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < tolerance, f"{name}: {error:.2e}"
