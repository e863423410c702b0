"""Survey every causal LM of transformers, tiny and random: what is replaced, and does the model compute the same?

    python tests/helpers/survey.py
    python tests/helpers/survey.py --models llama,deepseek_v3
    python tests/helpers/survey.py --auto AutoModelForImageTextToText   # with text alone

Two batches, one with padding on the right and one with it on the left, run forward and backward and in evaluation, in
fp32 on the CPU, where the ops run their definitions: this tests how a model is patched, not the kernels. Results go to
OUT/models*.json; ``liger-trainer plot --update docs/models.md`` makes the tables. Exit status 1 where a model fails or
differs.
"""

import argparse
import copy
import json
import math
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common
from benchmarks.common import INFINITE

LARGEST = 60_000_000  # parameters; a config with large defaults for sizes that SIZES lacks is left out
RESULT_FILES = {"AutoModelForCausalLM": "models", "AutoModelForImageTextToText": "models-image-text"}
TOLERANCE = 1e-4  # of each gradient and of the logits, relative to their norms; the loss a tenth of that
VOCAB, TOKENS, PADDING = 131, 12, 4
# Sizes, and the names that configs give them.
SIZES = {
    64: "hidden_size d_model n_embd dim embed_dim emb_dim word_embed_proj_dim embedding_size lru_width mamba_d_ssm "
        "max_position_embeddings n_positions",
    96: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim hidden_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size",
    16: "head_dim d_kv kv_lora_rank q_lora_rank v_head_dim qk_head_dim mamba_d_head mamba_head_dim linear_key_head_dim "
        "linear_value_head_dim index_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim state_size mamba_d_state mamba_chunk_size chunk_size "
       "sliding_window attention_window hidden_size_per_layer_input",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
       "num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads conv_kernel time_step_rank "
       "index_topk kernel_size",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads "
       "num_experts_per_tok num_experts_per_token moe_topk moe_k linear_num_key_heads linear_num_value_heads "
       "index_n_heads eos_token_id",
    1: "n_shared_experts first_k_dense_replace n_group topk_group n_groups mamba_n_groups mamba_expand expand "
       "num_mem_blocks bos_token_id",
    0: "num_kv_shared_layers pad_token_id router_aux_loss_coef num_nextn_predict_layers",
    VOCAB: "vocab_size vocab_size_per_layer_input",
}  # fmt: skip
NUMBERS = {name: number for number, names in SIZES.items() for name in names.split()}
UNSET = (  # needed, and None by default in some configs
    "pad_token_id", "head_dim", "num_attention_heads", "num_key_value_heads", "n_routed_experts", "n_shared_experts",
    "num_experts_per_tok", "rope_theta",
)  # fmt: skip
OWN = {"lfm2_moe": {"layer_types": ["conv", "full_attention"]}}  # further needs of a model type
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "moe_layer_freq", "no_rope_layers")


def shrink(config: Any) -> None:
    """Make ``config`` and the configs in it small: two layers, of different kinds where there are several."""
    from transformers import PreTrainedConfig

    has, numbers = vars(config), NUMBERS | {"rope_theta": 10000.0}
    if "kv_lora_rank" in has:  # multi-head latent attention: the rotary part is all that rope sees
        numbers |= {"head_dim": numbers["qk_rope_head_dim"], "num_key_value_heads": numbers["num_attention_heads"]}
    for name, number in numbers.items():
        value = has.get(name)
        if type(value) in (int, float) or (value is None and name in UNSET and name in has):
            setattr(config, name, float(number) if isinstance(value, float) else number)
    for name in PER_LAYER:
        if isinstance(has.get(name), list | tuple) and has[name]:
            setattr(config, name, (2 * list(dict.fromkeys(has[name])))[:2])
    if "use_cache" in has:
        config.use_cache = False
    _give_theta(has.get("rope_parameters"))
    for part in has.values():
        if isinstance(part, PreTrainedConfig):
            shrink(part)


def _give_theta(parameters: Any) -> None:
    """Set a base of the rotary frequencies where a config has none, and sections of M-RoPE that fit a small head."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters and parameters.get("rope_theta") is None:
        parameters["rope_theta"] = 10000.0
    if "mrope_section" in parameters:
        parameters["mrope_section"] = [4, 2, 2]
    for part in parameters.values():
        _give_theta(part)


def tiny_model(model_type: str, auto: str = "AutoModelForCausalLM") -> Any:
    """A random fp32 model of ``model_type`` without dropout or jitter, its vectors not all ones or zeros.

    Raises:
        ValueError: it has too many parameters. Other exceptions where its config cannot be made small like this.
    """
    import torch
    import transformers
    from transformers import AutoConfig

    defaults = AutoConfig.for_model(model_type)
    known = {k: type(vars(defaults)[k])(n) for k, n in NUMBERS.items() if type(vars(defaults).get(k)) in (int, float)}
    try:
        config = AutoConfig.for_model(model_type, **known | {"pad_token_id": 0} | OWN.get(model_type, {}))
    except Exception:  # a nested config, or a check of its own: shrink what it has by default
        config = defaults
    shrink(config)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    from_config = getattr(transformers, auto).from_config
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in from_config(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    model = from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if not torch.isfinite(parameter).all():  # left empty by its initialisation
                parameter.normal_(0, 0.02)
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # arguments of F.dropout; un-padded rows would draw other numbers
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
    return model


def train_once(model: Any) -> tuple:
    """Losses of a batch padded on the right and of one padded on the left, the gradients, and logits in evaluation."""
    import torch

    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, TOKENS), generator=random)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=random) < 0.3, -100)
    right, left = torch.ones_like(ids), torch.ones_like(ids)
    right[1, -PADDING:], left[0, :PADDING] = 0, 0
    torch.manual_seed(1)
    model.train().zero_grad()
    masks = (right, left)
    losses = [model(input_ids=ids, attention_mask=m, labels=labels.masked_fill(m == 0, -100)).loss for m in masks]
    losses = torch.stack(losses)
    losses.sum().backward()
    with torch.no_grad():
        model.eval()
        logits = torch.stack([model(input_ids=ids, attention_mask=m).logits for m in masks])
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, logits


def differences(ours: tuple, theirs: tuple) -> dict:
    """Relative differences of loss, logits, and the gradient that differs most; ``largest`` counts the loss tenfold.

    ``INFINITE`` stands for NaN, infinity, and a gradient that only one side has. A gradient far smaller than the
    largest one is compared with that.
    """

    def relative(ours: Any, theirs: Any, floor: float = 1e-30) -> float:
        error = float((ours - theirs).norm()) / max(float(theirs.norm()), floor)
        return error if math.isfinite(error) else INFINITE

    (our_loss, our_gradients, our_logits), (loss, gradients, logits) = ours, theirs
    floor = max(1e-4 * max(float(g.norm()) for g in gradients.values()), 1e-30)
    found = dict.fromkeys(our_gradients.keys() ^ gradients.keys(), INFINITE)
    found |= {n: relative(our_gradients[n], gradients[n], floor) for n in our_gradients.keys() & gradients.keys()}
    worst = max(found, key=lambda name: found[name])
    row = {"gradient": found[worst], "worst": worst}
    row |= {"loss": relative(our_loss, loss), "logits": relative(our_logits, logits)}
    return row | {"largest": max(row["gradient"], row["logits"], 10 * row["loss"])}


def check(auto: str, model_type: str) -> dict:
    """The row of one model."""
    import torch
    import transformers

    from liger_trainer import apply_liger
    from liger_trainer.patching import patch_state

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    row, failure = {"model_type": model_type}, "not built"
    try:
        model = tiny_model(model_type, auto)
        theirs = train_once(model)
        row["itself"] = differences(train_once(model), theirs)["largest"]
        if row["itself"] == INFINITE:
            raise ValueError("its loss, gradients or logits are not finite")
        row["class"], failure = type(model).__name__, "error"
        report = apply_liger(model)
        row |= differences(train_once(model), theirs)
        row["applied"] = dict(report.counts)  # now, because un-padding is checked by the first batch
        left = Counter((skipped.kind, skipped.reason) for skipped in report.skipped)
        state = patch_state(model)
        if "unpad" in row["applied"] and state is not None and not state.acted["unpad"][0].on:
            del row["applied"]["unpad"]  # a window of 8 tokens, for instance, which attention is not told
            left["unpad", "did not act on the batches of this survey"] += 1
        row["skipped"] = [{"kind": k, "reason": r, "count": n} for (k, r), n in left.items()]
    except Exception as error:
        return row | {"status": failure, "note": " ".join(f"{type(error).__name__}: {error}".split())[:160]}
    if row["largest"] <= TOLERANCE:
        return row | {"status": "same"}
    return row | {"status": "not repeatable" if row["largest"] <= 2 * row["itself"] else "differs"}


def main(argv: list[str] | None = None) -> int:
    """Check them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--auto", choices=RESULT_FILES, default="AutoModelForCausalLM", help="the models' auto class")
    parser.add_argument("--models", type=lambda text: text.split(","), help="only these, for example llama,gpt2")
    common.add_output_options(parser)
    args = parser.parse_args(argv)
    import transformers

    chosen = args.models or sorted(getattr(transformers, args.auto)._model_mapping._model_mapping)
    os.environ["TRITON_INTERPRET"] = "0"  # the processes below run the definitions, not interpreted kernels
    about = {"device": "cpu", "driver": None, **common.software()}
    path = (args.out or common.RESULTS) / f"{RESULT_FILES[args.auto]}.json"
    results = common.ResultFile(path, ("model_type",), common.provenance(about, args.commit))
    progress, failed = common.Progress(len(chosen)), False
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(partial(check, args.auto), chosen):
            results.add(row)
            failed |= row["status"] in ("differs", "error")
            progress.step(f"{row['model_type']}: {row['status']} {json.dumps(row.get('applied', row.get('note')))}")
    print(f"written: {results.path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
