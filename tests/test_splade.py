"""linear_splade in sentence-transformers' SparseEncoder; skipped where that package is not installed."""

import copy
import gc
import itertools
import sys
import weakref

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast

from liger_trainer import apply_liger
from liger_trainer.splade import apply_splade, revert_splade

REASON = "sentence-transformers is not installed"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(95))]


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("sentence_transformers", reason=REASON)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    torch.nn.init.normal_(model.cls.predictions.bias, std=0.5)
    model.save_pretrained(tmp_path)
    return str(tmp_path)


def encoder(folder, pooling="max", activation="relu"):
    from sentence_transformers import SparseEncoder
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sparse_encoder.modules import SpladePooling

    modules = [Transformer(folder, transformer_task="fill-mask"), SpladePooling(pooling, activation)]
    return SparseEncoder(modules=modules, device="cpu")


def texts(count, seed):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=random).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(0, 95, (n,), generator=random).tolist()) for n in lengths]


def train(folder, use_liger, output, **form):
    from sentence_transformers import SparseEncoderTrainer, SparseEncoderTrainingArguments
    from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

    model = encoder(folder, **form)
    if use_liger:
        apply_splade(model)
        apply_liger(model)
    args = SparseEncoderTrainingArguments(
        str(output), max_steps=10, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, optim="sgd", lr_scheduler_type="constant",
    )  # fmt: skip
    ranking = SparseMultipleNegativesRankingLoss(model)
    loss = SpladeLoss(model, loss=ranking, document_regularizer_weight=1e-2, query_regularizer_weight=1e-2)
    data = Dataset.from_dict({"query": texts(24, 1), "document": texts(24, 2)})
    trainer = SparseEncoderTrainer(model=model, args=args, train_dataset=data, loss=loss)
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.long
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
@pytest.mark.parametrize("pooling", ["max", "sum"])
def test_ten_steps_are_the_same(pooling, activation, folder, tmp_path):
    form = {"pooling": pooling, "activation": activation}
    (theirs, expected), (ours, losses) = (train(folder, flag, tmp_path / "out", **form) for flag in (False, True))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    for (name, weight), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6, msg=name)
    assert ours._liger_splade[0].calls_fused == 20  # queries and documents


def test_embeddings_are_the_same_and_reverting_is_exact(folder):
    model = encoder(folder)
    expected = model.encode(texts(5, 3)).to_dense()
    projection = model[0].model.get_output_embeddings()
    apply_splade(model)
    apply_splade(model)
    torch.testing.assert_close(model.encode(texts(5, 3)).to_dense(), expected, rtol=1e-5, atol=1e-6)
    assert model._liger_splade[0].calls_fused == 1
    logits = projection(torch.zeros(1, 32))  # outside of the encoder it projects
    assert logits.shape == (1, 100)
    revert_splade(model)
    assert torch.equal(model.encode(texts(5, 3)).to_dense(), expected)
    assert "forward" not in vars(projection)


def test_sequences_in_one_row(folder):
    """As they come with flash attention, which does not run on a CPU."""
    model = encoder(folder)
    hidden, bounds = torch.randn(1, 9, 32), torch.tensor([0, 4, 9])
    pooling, projection = model[1].eval(), model[0].model.get_output_embeddings()
    with torch.no_grad():
        features = {"token_embeddings": projection(hidden), "cu_seq_lens_q": bounds}
        expected = pooling(features)["sentence_embedding"]
        apply_splade(model)
        ours = pooling({"token_embeddings": hidden, "cu_seq_lens_q": bounds})["sentence_embedding"]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


class Transformer(nn.Module):
    """Stands for sentence-transformers' module of this name."""

    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
        self.model = BertForMaskedLM(config)

    def forward(self, features):
        return features | {"token_embeddings": self.model(**features).logits}


class SpladePooling(nn.Module):
    """Stands for the other one."""

    pooling_strategy, activation_function, embedding_dimension = "max", "relu", None

    def forward(self, features):
        scores = features["token_embeddings"].relu().log1p() * features["attention_mask"].unsqueeze(-1)
        return {"sentence_embedding": scores.max(dim=1).values}


def test_a_deep_copy_uses_its_own_weights_and_the_original_is_freed():
    model = nn.Sequential(Transformer(), SpladePooling())
    apply_splade(model)
    copied = copy.deepcopy(model)
    features = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    gc.collect()
    gc.disable()
    try:
        modules = [weakref.ref(module) for module in model.modules()]
        del model
        alive = [type(ref()).__name__ for ref in modules if ref() is not None]
    finally:
        gc.enable()
    assert not alive
    assert copied(features)["sentence_embedding"].shape == (1, 20)
    assert copied._liger_splade[0].calls_fused == 1
    nn.init.zeros_(copied[0].model.get_output_embeddings().weight)
    nn.init.zeros_(copied[0].model.get_output_embeddings().bias)
    assert not copied(features)["sentence_embedding"].any()


@pytest.mark.parametrize("call", [1, 2])  # before and after the change
def test_a_model_that_fails_is_left_as_it_was(call):
    model = nn.Sequential(Transformer(), SpladePooling())
    model[0].model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    calls = itertools.count(1)

    def fail(*args):
        if next(calls) == call:
            raise RuntimeError("out of memory")

    handle = model[0].model.bert.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        apply_splade(model)
    handle.remove()
    assert [module.training for module in model.modules()] == modes
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())
    apply_splade(model)


def test_another_structure_is_an_error(folder):
    model = encoder(folder)
    del model[1]
    with pytest.raises(ValueError, match="must be a Transformer and a SpladePooling"):
        apply_splade(model)


def test_the_module_needs_no_sentence_transformers():
    assert "liger_trainer.splade" in sys.modules
    with pytest.raises(ValueError, match="got modules Linear"):
        apply_splade(torch.nn.Sequential(torch.nn.Linear(2, 2)))
