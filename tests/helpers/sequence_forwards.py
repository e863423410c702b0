"""Steps of a sequence that run a model: training, evaluation, function transforms, threads, offload, compilation."""

import copy
import threading
from typing import Any

import accelerate
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from model_pair import compare, core_of, evaluation, gradients
from sequence_base import (
    NOT_DIFFERENTIABLE_TWICE,
    Late,
    SequenceBase,
    batches,
    contexts,
    readers,
    simple_batches,
)
from torch import Tensor, nn
from user_batches import READERS, Batch
from user_steps import factor_on, frozen_part


class ForwardRules(SequenceBase):
    """Every step gives the same on both models."""

    @rule(batch=batches, how=st.sampled_from(("once", "scaled", "twice", "accumulated", "autocast")))
    def train(self, batch: Batch, how: str) -> None:
        self.check_training(batch, how)

    @rule(first=simple_batches, second=simple_batches, between=st.sampled_from(("train", "evaluate", "no labels")))
    def train_on_two(self, first: Batch, second: Batch, between: str) -> None:
        """Two losses, or a loss and an evaluation, before the backward."""

        def step(model: nn.Module) -> dict[str, Any]:
            model.train()
            model.zero_grad()
            loss = first.call(model)[0]
            if between == "evaluate":
                with evaluation(model, "no_grad"):
                    second.call(model)
                model.train()
            elif between == "no labels":
                loss = loss + Batch(second.padding, "none", seed=second.seed).call(model)[1].float().square().mean()
            else:
                loss = loss + second.call(model)[0]
            loss.backward()
            return {"loss": loss, "logits": None, "gradients": gradients(model)}

        self.compare_training(first, step)

    @rule(batch=batches, context=contexts, reader=readers)
    def evaluate(self, batch: Batch, context: str, reader: str) -> None:
        self.check_evaluation(batch, context, reader)

    @rule(batch=batches, context=contexts)
    def evaluate_and_read_later(self, batch: Batch, context: str) -> None:
        kept: list[Tensor] = []

        def step(model: nn.Module) -> dict[str, Any]:
            with evaluation(model, context):
                loss, logits = batch.call(model)
            kept.append(logits.detach())  # without the graph, which would keep the shapes of weights
            return {"loss": loss}

        documented = context == "train mode" and batch.padding == "right"  # other values at padding
        if self.compare_evaluation(batch, context, step) and not documented:
            self.late.append(Late(kept[0], kept[1], self.pair.tolerance))

    @precondition(lambda self: self.late)
    @rule(reader=readers)
    def read_late(self, reader: str) -> None:
        late = self.late.pop()
        results = self.pair.both(
            lambda model: READERS[reader]((late.theirs if model is self.pair.plain else late.ours).detach())
        )
        if results is not None:
            compare("late logits", *results, late.tolerance)

    @rule(batch=simple_batches, reader=readers)
    def change_hidden_states(self, batch: Batch, reader: str) -> None:
        """Hidden states that a model returned are changed in place before the logits are read."""
        batch = Batch(batch.padding, extra="hidden states", seed=batch.seed)

        def step(model: nn.Module) -> Any:
            with evaluation(model, "no_grad"):
                output = batch.output(model)
                output.hidden_states[-1].mul_(3)
                return READERS[reader](output.logits)

        self.pair.same(step, self.promised(False))

    @rule(batch=simple_batches, part=st.sampled_from(("all", "head", "all but the head")), factor=st.just(1.5))
    def evaluate_with_average_weights(self, batch: Batch, part: str, factor: float) -> None:
        """EMA weights for one evaluation, whose logits are read after the swap back."""

        def step(model: nn.Module) -> dict[str, Any]:
            with evaluation(model, "no_grad"):
                with factor_on(list(frozen_part(model, part)), factor):
                    loss, logits = batch.call(model)
                return {"loss": loss, "logits": logits.clone()}

        self.pair.same(step, self.promised(False))

    @rule(batch=simple_batches)
    def evaluate_a_copy_made_in_inference_mode(self, batch: Batch) -> None:
        """Such weights have no version counter."""

        def step(model: nn.Module) -> dict[str, Any]:
            with torch.inference_mode():
                loss, logits = batch.call(copy.deepcopy(model).eval())
                return {"loss": loss, "logits": logits.clone()}

        self.pair.same(step, self.promised(False))

    @rule(batch=simple_batches, how=st.sampled_from(("evaluate", "train")))
    def functional_call(self, batch: Batch, how: str) -> None:
        def step(model: nn.Module) -> dict[str, Any]:
            model.zero_grad()
            model.train(how == "train")
            weights = {name: p * 1.5 for name, p in model.named_parameters()}
            inputs = batch.inputs(model)
            with torch.set_grad_enabled(how == "train"):
                output = torch.func.functional_call(model, weights, (), inputs)
                if how == "train":
                    output.loss.backward()
                    return {"loss": output.loss, "gradients": gradients(model)}
                return {"loss": output.loss, "logits": output.logits.clone()}

        if self.pair.same(step, self.promised(how == "train")) is None:
            self.pair.forget_gradients()

    @rule(batch=simple_batches, how=st.sampled_from(("func.grad", "double backward", "vmap", "jvp")))
    def transform(self, batch: Batch, how: str) -> None:
        """torch.func's transforms and gradients of gradients."""

        def step(model: nn.Module) -> dict[str, Any]:
            model.train()
            weights = {name: p.detach() for name, p in model.named_parameters()}
            inputs = batch.inputs(model)

            def loss_of(parameters: dict[str, Tensor], **rows: Tensor) -> Tensor:
                return torch.func.functional_call(model, parameters, (), inputs | rows).loss

            if how == "func.grad":
                return {"gradients": torch.func.grad(loss_of)(weights)}
            if how == "jvp":
                _, change = torch.func.jvp(loss_of, (weights,), (weights,))
                return {"change": change}
            if how == "vmap":
                each = torch.func.grad(lambda parameters, ids: loss_of(parameters, input_ids=ids[None]))
                del inputs["attention_mask"]  # transformers looks at its values, which vmap does not allow
                ids = inputs["input_ids"]
                inputs |= {"labels": ids[:1], "use_cache": False, "position_ids": torch.arange(ids.shape[1])[None]}
                return {"gradients": torch.func.vmap(each, in_dims=(None, 0))(weights, ids)}
            parameters = [p for p in model.parameters() if p.requires_grad]
            first = torch.autograd.grad(batch.call(model)[0], parameters, create_graph=True, allow_unused=True)
            total = sum(g.square().sum() for g in first if g is not None)
            second = torch.autograd.grad(total, parameters, allow_unused=True)
            return {"gradients": {str(i): g for i, g in enumerate(second) if g is not None}}

        result = self.pair.same(step, [*self.promised(True), NOT_DIFFERENTIABLE_TWICE], 10 * self.pair.tolerance)
        if result is None:
            self.graph_lives = True
        self.pair.forget_gradients()

    @precondition(lambda self: self.pair.tolerance < 1e-3)
    @rule(batch=simple_batches)
    def generate(self, batch: Batch) -> None:
        def step(model: nn.Module) -> Any:
            model.eval()
            inputs = batch.inputs(model)
            return model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

        self.pair.same(step)

    @rule(training=st.booleans())
    def call_with_unknown_ids(self, training: bool) -> None:
        def step(model: nn.Module) -> None:
            model.train(training)
            inputs = Batch().inputs(model)
            model(**inputs | {"input_ids": inputs["input_ids"] + 10_000})

        self.pair.both(step)

    @rule(first=simple_batches, second=simple_batches)
    def evaluate_in_two_threads(self, first: Batch, second: Batch) -> None:
        """The second forward begins within the first and goes on after it."""

        def step(model: nn.Module) -> list[Any]:
            model.eval()
            results: dict[str, Any] = {}
            first_began, second_began, first_ended = (threading.Event() for _ in range(3))

            def take_turns(*args: Any) -> None:
                if threading.current_thread().name == "first":
                    first_began.set()
                    second_began.wait()
                else:
                    second_began.set()
                    first_ended.wait()

            def work(batch: Batch) -> None:
                name = threading.current_thread().name
                try:
                    with torch.no_grad():
                        results[name] = [x.clone() for x in batch.call(model)]
                except Exception as error:
                    results[name] = f"{type(error).__name__}: {error}"
                for event in (first_began, first_ended) if name == "first" else (second_began,):
                    event.set()

            handle = core_of(model).get_input_embeddings().register_forward_hook(take_turns)
            threads = [
                threading.Thread(target=work, args=[b], name=n) for n, b in (("first", first), ("second", second))
            ]
            threads[0].start()
            first_began.wait()
            threads[1].start()
            for thread in threads:
                thread.join()
            handle.remove()
            return [results["first"], results["second"]]

        self.pair.same(step)

    @rule(batch=simple_batches, late=st.booleans())
    def evaluate_offloaded(self, batch: Batch, late: bool) -> None:
        """accelerate's CPU offload: weights are there during a module's forward only."""

        def step(model: nn.Module) -> dict[str, Any]:
            twin = copy.deepcopy(model)
            accelerate.cpu_offload(core_of(twin), execution_device=torch.device("cpu"))
            with evaluation(twin, "no_grad"):
                loss, logits = batch.call(twin)
                if late:
                    accelerate.hooks.remove_hook_from_submodules(core_of(twin))
                return {"loss": loss, "logits": logits.clone()}

        self.pair.same(step, self.promised(False))

    @precondition(lambda self: self.may_compile)
    @rule(batch=simple_batches, training=st.booleans(), fullgraph=st.booleans())
    def compile(self, batch: Batch, training: bool, fullgraph: bool) -> None:
        self.may_compile = False

        def step(model: nn.Module) -> dict[str, Any]:
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
            model.train(training)
            model.zero_grad()
            with torch.set_grad_enabled(training):
                output = compiled(**batch.inputs(model))
                if training:
                    output.loss.backward()
                    return {"loss": output.loss, "gradients": gradients(model)}
                return {"loss": output.loss, "logits": output.logits.clone()}

        # gpt2's own loss_function logs a warning, which is an error with fullgraph; the fused loss does not call it.
        results = self.pair.both(step, self.promised(training), patched_may_do_more=fullgraph)
        if results is not None:
            compare("compiled", *results, self.pair.tolerance)
        self.pair.forget_gradients()
