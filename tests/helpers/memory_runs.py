"""Steps of a small model on a made-up card: what the tests of recomputing by memory run."""

import torch
from fake_card import FakeCard
from tiny_models import VOCAB, tiny_model

from liger_trainer import apply_liger
from liger_trainer.memory.plan import peak
from liger_trainer.memory.recompute import recompute_of

LAYERS = 8
CONFIG = {"logits_budget_mib": 1, "memory_margin": 0.04}
PLENTY = 10**8


def model_of(asked, layers=LAYERS, **kwargs):
    model = tiny_model("llama", num_hidden_layers=layers, max_position_embeddings=512, **kwargs).train()
    if asked:
        model.activation_checkpointing_enable()
    return model


def batch(tokens, rows=4, seed=0):
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "use_cache": False}


class Run:
    """Steps of one model on one card; notes gradients, peaks and what was recomputed."""

    def __init__(self, model, fake):
        self.model, self.fake = model, fake
        self.results, self.recomputed, self.peaks, self.planned = [], [], [], []

    def step(self, inputs, keep=True):
        self.fake.most = self.fake.live
        with self.fake:
            loss = self.model(**inputs).loss
            loss.backward()
            found = recompute_of(self.model)
            run = found and found.last
        self.peaks.append(self.fake.most)
        if run:
            known = run.recomputed is not None and found.measured.kinds[0] in found.measured.kept
            self.planned.append(peak(found._costs(run), run.recomputed) if known else None)
            self.recomputed.append(None if run.recomputed is None else len(run.recomputed))
        # As numbers of another library, which are not on the card.
        gradients = {n: p.grad.numpy().copy() for n, p in self.model.named_parameters() if p.grad is not None}
        self.results.append((loss.item(), gradients))
        if not keep:
            self.model.zero_grad()
        return self


def run_of(put, model, config=None, total=PLENTY, others=0):
    fake = put(FakeCard(total, others, [*model.parameters(), *model.buffers()]))
    if config is not None:
        apply_liger(model, {**CONFIG, **config})
    return Run(model, fake)


def assert_equal(ours, theirs):
    for (loss, gradients), (expected, exact) in zip(ours.results, theirs.results, strict=True):
        assert loss == expected
        assert gradients.keys() == exact.keys()
        assert all((gradients[name] == exact[name]).all() for name in exact)
