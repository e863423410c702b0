"""Medusa heads: the formula in fp64, fused against plain, the stock Trainer, saving, and memory against head count."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from medusa_models import inputs_of, medusa_model
from safetensors.torch import load_file
from tiny_models import assert_same_training, batch, loss_and_gradients, tiny_model
from torch.profiler import ProfilerActivity, profile
from training import Rows, arguments, assert_same_run, losses, train
from transformers import AutoModelForCausalLM, Trainer

from liger_trainer import MedusaConfig, MedusaModel, apply_liger
from liger_trainer.medusa import heads as medusa_heads
from liger_trainer.medusa.loss import plain_head_loss, residual_blocks
from liger_trainer.patching import patch_state, revert_liger


def expected(model, inputs):
    """The loss, each head's and the LM's, and all gradients from the formula, in fp64 and a loop over positions."""
    double = medusa_model_in_fp64(model)
    config, labels = model.medusa, inputs["labels"]
    hidden = double.lm.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    if config.stage == 1:
        hidden = hidden.detach()
    rows, tokens = labels.shape
    count = max(1, sum(labels[b, t] != -100 for b in range(rows) for t in range(1, tokens)))

    def mean_loss(logits, ahead):
        pairs = [(b, t) for b in range(rows) for t in range(tokens - ahead) if labels[b, t + ahead] != -100]
        return (
            sum((-logits[b, t].log_softmax(-1)[labels[b, t + ahead]] for b, t in pairs), logits.new_zeros(())) / count
        )

    total, each = 0.0, []
    for k, head in enumerate(double.medusa_heads, 1):
        width, x = hidden.shape[-1], hidden
        for layer in range(config.layers):
            rows_of = slice(layer * width, (layer + 1) * width)
            z = x @ head.residual_weight[rows_of].T + head.residual_bias[rows_of]
            x = x + z * torch.sigmoid(z)
        each.append(mean_loss(x @ head.weight.T, 1 + k))
        total = total + config.coefficient * config.decay**k * each[-1]
    lm_loss = mean_loss(double.lm.lm_head(hidden), 1) if config.stage == 2 else None
    total = total if lm_loss is None else total + lm_loss
    parameters = {n: p for n, p in double.named_parameters() if p.requires_grad}
    (total + 0.0 * sum(p.sum() for p in parameters.values())).backward()  # a gradient of 0 where no label counts
    gradients = {n: p.grad for n, p in parameters.items()}
    return total.detach(), torch.stack(each).detach(), lm_loss, gradients


def medusa_model_in_fp64(model):
    double = MedusaModel(model.config, tiny_model(model.config.text_config.model_type))
    double.load_state_dict(model.state_dict())
    return double.double().train()


@pytest.mark.parametrize(
    ("model_type", "stage", "heads", "layers", "kind"),
    [
        ("llama", 1, 3, 1, "ragged"),
        ("llama", 2, 3, 2, "ragged"),
        ("qwen2", 1, 1, 1, "ragged"),
        ("qwen2", 2, 1, 1, "ragged"),
        ("llama", 2, 3, 1, "short"),
        ("qwen2", 2, 3, 1, "all ignored"),
        ("llama", 1, 3, 1, "all ignored"),
    ],
)
def test_loss_and_gradients_follow_the_formula(model_type, stage, heads, layers, kind):
    settings = {"stage": stage, "heads": heads, "layers": layers, "coefficient": 0.3, "decay": 0.7}
    inputs = inputs_of(kind)
    plain = medusa_model(model_type, **settings)
    total, each, lm_loss, gradients = expected(plain, inputs)
    with torch.no_grad():
        assert plain(**inputs).loss.item() == pytest.approx(total.item(), rel=1e-5)
    fused = medusa_model(model_type, patched=True, **settings)
    for model in (plain, fused):
        output = model(**inputs)
        torch.testing.assert_close(output.head_losses.double(), each, rtol=1e-5, atol=1e-6)
        assert (output.lm_loss is None) == (stage == 1)
        if stage == 2:
            torch.testing.assert_close(output.lm_loss.double(), lm_loss.detach(), rtol=1e-5, atol=1e-6)
        loss, ours = loss_and_gradients(model, inputs)
        assert_same_training((total, gradients), (loss.double(), ours))
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trained == ours.keys()
        assert all(n.startswith("medusa_heads.") for n in trained) == (stage == 1)


@pytest.mark.triton
@pytest.mark.parametrize("stage", [1, 2])
def test_with_the_triton_kernels(stage):
    inputs = inputs_of("ragged")
    plain, fused = (medusa_model("llama", patched, heads=2, stage=stage) for patched in (False, True))
    assert_same_training(loss_and_gradients(plain, inputs), loss_and_gradients(fused, inputs))
    theirs, ours = (
        [upstream * g for g in backward_twice(m, inputs, 1.0)] for m, upstream in ((plain, 2.0), (fused, 2.0))
    )
    scaled = backward_twice(fused, inputs, 2.0)
    torch.testing.assert_close(scaled, ours, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def backward_twice(model, inputs, upstream):
    """Gradients added up by two backward passes over one forward."""
    model.zero_grad()
    loss = model(**inputs).loss
    (upstream * loss).backward(retain_graph=True)
    (upstream * loss).backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("stage", [1, 2])
def test_upstream_gradients(stage):
    inputs = inputs_of("ragged")
    theirs, ours = (backward_twice(medusa_model("qwen2", p, heads=3, stage=stage), inputs, 0.3) for p in (False, True))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_with_a_loss_scale(dtype):
    """Gradients in autocast err no more than the plain ones do; in fp16 without the loss scale they would vanish."""
    inputs = batch(rows=2, tokens=9) | {"num_items_in_batch": torch.tensor(300_000)}
    exact, plain, fused = (medusa_model("llama", p, heads=2, stage=2) for p in (False, False, True))
    exact = loss_and_gradients(exact, inputs)[1]
    errors = []
    for model in (plain, fused):
        with torch.autocast("cpu", dtype):
            loss = model(**inputs).loss
        (2.0**16 * loss).backward()
        gradients = {n: p.grad / 2**16 for n, p in model.named_parameters()}
        errors.append({n: (gradients[n] - g).norm() / g.norm() for n, g in exact.items()})
    for name, error in errors[1].items():
        assert error < 1.5 * errors[0][name] + 1e-3, f"{name}: {error:.1e}, plain {errors[0][name]:.1e}"


def test_which_loss_the_heads_take(monkeypatch):
    inputs = inputs_of("ragged")
    calls = []

    def own(hidden, weight, labels):
        calls.append((hidden.shape, weight.shape, labels.shape))
        return plain_head_loss(hidden, weight, labels)

    reference = loss_and_gradients(medusa_model(heads=2, stage=2), inputs)
    injected = medusa_model(heads=2, stage=2, patched=True, head_loss=own)
    assert_same_training(reference, loss_and_gradients(injected, inputs))
    assert calls == [((27, 64), (131, 64), (27,))] * 2
    for options in ({"fused_loss": False}, None):  # not asked for, and taken back
        model = medusa_model(heads=2, stage=2)
        apply_liger(model, options)
        if options is None:
            revert_liger(model)
        with monkeypatch.context() as patch:
            patch.setattr(medusa_heads, "fused_head_loss", lambda *args: pytest.fail("fused"))
            assert_same_training(reference, loss_and_gradients(model, inputs))


def test_no_work_for_gradients_that_nobody_wants(monkeypatch):
    inputs = inputs_of("ragged")
    model = medusa_model(patched=True, stage=1)
    expected_loss = medusa_model(stage=1)(**inputs).loss
    monkeypatch.setattr(medusa_heads, "open_gate", lambda *args: pytest.fail("the hidden states are frozen"))
    assert model(**inputs).loss.requires_grad
    assert not model.lm.training
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: pytest.fail("no gradient is wanted"))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).loss, expected_loss.detach())


def peak_bytes(heads, hidden, labels, head_loss):
    """Largest memory that a forward and backward of the heads allocates, the heads' own gradients apart."""
    parameters = sum(p.numel() * p.element_size() for p in heads.parameters() if p.requires_grad)
    heads.zero_grad()
    hidden.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss, _ = heads(hidden, labels, 100, head_loss, {})
        if loss.requires_grad:
            loss.backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak - parameters * loss.requires_grad


@pytest.mark.parametrize("wanted", ["hidden", "heads", "nothing"])
def test_memory_does_not_grow_with_the_number_of_heads(wanted):
    """Memory above the parameters' gradients. With plain losses it does grow, so the measurement can tell."""
    torch.manual_seed(0)
    hidden = torch.randn(4, 64, 32, requires_grad=wanted == "hidden")
    labels = torch.randint(0, 1500, (4, 64))
    peaks = {}
    for name, head_loss in (("fused", None), ("plain", plain_head_loss)):
        for count in (1, 5):
            heads = medusa_heads.MedusaHeads(torch.randn(1500, 32), MedusaConfig(heads=count))
            heads.requires_grad_(wanted != "nothing")
            peak_bytes(heads, hidden, labels, head_loss)  # what is made once
            peaks[name, count] = peak_bytes(heads, hidden, labels, head_loss)
    assert peaks["fused", 5] < 1.05 * peaks["fused", 1]
    if wanted != "nothing":
        assert peaks["plain", 5] > 2 * peaks["plain", 1]


def ragged(i):
    return (12, 3, 7, 2, 1, 9)[i % 6]


SGD = {"optim": "sgd", "learning_rate": 0.1}


def run(directory, use_liger, stage=2, model_type="qwen2", valid=ragged, **settings):
    model = medusa_model(model_type, heads=3, stage=stage)
    with mock.patch.object(medusa_heads, "fused_head_loss", wraps=medusa_heads.fused_head_loss) as fused:
        trainer = train(directory, use_liger, model=model, dataset=Rows(valid=valid), **{**SGD, **settings})
    state = patch_state(model)
    assert (state is not None) == use_liger
    forwards = 5 * settings.get("gradient_accumulation_steps", 1)
    assert fused.call_count == 3 * forwards * use_liger
    if use_liger:
        assert not state.report.skipped
        assert state.fused.calls_fused == forwards
    return trainer


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (1, {}),
        (2, {}),
        (1, {"gradient_accumulation_steps": 3}),
        (2, {"gradient_accumulation_steps": 3, "activation_checkpointing": True}),
    ],
)
def test_five_trainer_steps_are_the_same(stage, settings, tmp_path, caplog):
    theirs, ours = (run(tmp_path, flag, stage, **settings) for flag in (False, True))
    assert_same_run(theirs, ours)
    assert "fused loss" not in caplog.text
    start = medusa_model("qwen2", heads=3, stage=stage).state_dict()
    moved = {n for n, w in ours.model.state_dict().items() if not torch.equal(w, start[n])}
    assert moved == {n for n in start if stage == 2 or n.startswith("medusa_heads.")}
    theirs, ours = (trainer.evaluate(Rows(4, valid=ragged))["eval_loss"] for trainer in (theirs, ours))
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("use_liger", [False, True])
def test_accumulation_equals_a_large_batch(use_liger, tmp_path):
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    large = {"per_device_train_batch_size": 4}
    runs = []
    for shape in (small, large):
        model = medusa_model("llama", heads=3, stage=2)
        runs.append(train(tmp_path, use_liger, model=model, dataset=Rows(valid=ragged), **SGD, **shape))
    assert_same_run(*runs)


@pytest.mark.parametrize(("model_type", "stage"), [("qwen2", 2), ("llama", 1)])
def test_save_load_resume_and_export(model_type, stage, tmp_path):
    whole = run(tmp_path, True, stage, model_type, save_strategy="steps", save_steps=3)
    whole.save_model()
    weights = whole.model.state_dict()
    loaded = MedusaModel.from_pretrained(tmp_path)
    assert loaded.medusa == whole.model.medusa
    assert all(torch.equal(w, weights[n]) for n, w in loaded.state_dict().items())
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in whole.model.named_parameters() if p.requires_grad
    }
    inputs = inputs_of("ragged")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).loss, whole.model.eval()(**inputs).loss)

    resumed = Trainer(
        medusa_model(model_type, heads=3, stage=stage),
        arguments(tmp_path, use_liger=True, **SGD),
        train_dataset=Rows(valid=ragged),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(losses(resumed)[3:], losses(whole)[3:])

    loaded.export(tmp_path / "export")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    assert all(torch.equal(w, weights[f"lm.{n}"]) for n, w in lm.state_dict().items())
    heads = load_file(tmp_path / "export" / "medusa_lm_head.safetensors")
    assert len(heads) == 3 * 3
    hidden = torch.randn(2, 64)
    block = hidden + F.silu(F.linear(hidden, heads["1.0.linear.weight"], heads["1.0.linear.bias"]))
    head = loaded.medusa_heads[1]
    theirs = residual_blocks(hidden, head.residual_weight, head.residual_bias) @ head.weight.T
    torch.testing.assert_close(F.linear(block, heads["1.1.weight"]), theirs.detach())


def test_new_heads_are_the_lms_own_and_leave_it_as_it_is():
    lm = tiny_model("mixtral").bfloat16()
    ways = lm.config._attn_implementation, lm.config._experts_implementation
    assert None not in ways
    model = MedusaModel.from_causal_lm(lm, MedusaConfig(heads=2, layers=2))
    assert (lm.config._attn_implementation, lm.config._experts_implementation) == ways
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    hidden = torch.randn(3, 64, dtype=torch.bfloat16)
    for head in model.medusa_heads:
        assert torch.equal(residual_blocks(hidden, head.residual_weight, head.residual_bias), hidden)
        assert torch.equal(head.weight, lm.lm_head.weight)
        assert head.weight is not lm.lm_head.weight


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads: got 0; must be at least 1"),
        ({"heads": 2.0}, TypeError, r"heads: got 2\.0; must be an int"),
        ({"layers": 0}, ValueError, "layers: got 0; must be at least 1"),
        ({"coefficient": 0.0}, ValueError, r"coefficient: got 0\.0; must be above 0 and finite"),
        ({"coefficient": "0.2"}, TypeError, "coefficient: got '0.2'; must be a float"),
        ({"decay": 1.5}, ValueError, r"decay: got 1\.5; must be above 0 and at most 1"),
        ({"stage": 3}, ValueError, r"stage: got 3; must be 1 .* or 2 .*"),
    ],
)
def test_bad_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        MedusaConfig(**settings)


def test_bad_calls_are_named():
    inputs = batch()
    with pytest.raises(TypeError, match="lm: got Linear; must be a transformers PreTrainedModel"):
        MedusaModel.from_causal_lm(torch.nn.Linear(2, 2), MedusaConfig())
    with pytest.raises(ValueError, match="got LlamaModel; must be a causal LM with a backbone and output embeddings"):
        MedusaModel.from_causal_lm(tiny_model("llama").model, MedusaConfig())
    model = medusa_model(patched=True)
    with pytest.raises(ValueError, match="labels: got None; must be given"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="shift_labels"):
        model(**inputs, shift_labels=inputs["labels"])
    model.medusa_heads[0].weight.data = torch.empty(0)  # as a sharded engine leaves it outside the head's call
    with pytest.raises(ValueError, match=r"MedusaHead\.weight: got .*; must be materialised"):
        model(**inputs)
