"""Steps of a sequence that change a model: patching, hooks, settings, modules, weights, copies, adapters."""

import copy
import gc
import pickle
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from model_pair import TOLERANCE, core_of, evaluation
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from sequence_base import CONFIGS, SequenceBase, contexts, simple_batches
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from user_batches import Batch
from user_steps import (
    FREEZABLE,
    HOOKS,
    MODEL_HOOKS,
    PARTS,
    REPLACEMENTS,
    SETTINGS,
    SWAPS,
    Square,
    change_weights,
    frozen_part,
)


class ChangeRules(SequenceBase):
    """After every step the models are compared by ``SequenceBase.agree``."""

    @rule(config=st.sampled_from(CONFIGS))
    def apply(self, config: dict[str, Any]) -> None:
        self.unchecked = True
        self.pair.apply(config)

    @precondition(lambda self: self.pair.is_patched)
    @rule()
    def revert(self) -> None:
        self.unchecked = True
        self.pair.revert()

    @rule(rate=st.sampled_from((0.1, 0.01)))
    def optimizer_step(self, rate: float) -> None:
        def step(model: nn.Module) -> dict[str, Tensor]:
            torch.optim.SGD(model.parameters(), rate).step()
            model.zero_grad()
            return dict(model.state_dict())

        if next(self.pair.plain.parameters()).dtype == torch.bfloat16:
            self.pair.tolerance = TOLERANCE[torch.bfloat16]
        self.unchecked = True
        self.pair.same(step)

    @rule(part=st.sampled_from(tuple(PARTS)), kind=st.sampled_from(tuple(HOOKS)))
    def hook(self, part: str, kind: str) -> None:
        handles = self.change(lambda model: HOOKS[kind](PARTS[part](model)))
        if handles is not None:
            self.hooks.append(handles)

    @rule(kind=st.sampled_from(tuple(MODEL_HOOKS)))
    def hook_on_the_model(self, kind: str) -> None:
        handles = self.change(lambda model: MODEL_HOOKS[kind](core_of(model)))
        if handles is not None:
            self.hooks.append(handles)

    @precondition(lambda self: self.hooks)
    @rule()
    def remove_hook(self) -> None:
        self.unchecked = True
        for handle in self.hooks.pop():
            handle.remove()

    @rule(kind=st.sampled_from(tuple(SETTINGS)))
    def change_setting(self, kind: str) -> None:
        self.change(lambda model: SETTINGS[kind](model))

    @rule(kind=st.sampled_from(tuple(REPLACEMENTS)))
    def replace_module(self, kind: str) -> None:
        self.change(lambda model: REPLACEMENTS[kind](model))

    @rule(part=st.sampled_from(("lm_head", "last norm", "projection")), how=st.sampled_from(("square", "prune")))
    def parametrize(self, part: str, how: str) -> None:
        def step(model: nn.Module) -> None:
            module = PARTS[part](model)
            if how == "square":
                parametrize.register_parametrization(module, "weight", Square())
            else:
                prune.l1_unstructured(module, "weight", amount=0.3)

        self.change(step)

    @rule(part=st.sampled_from(FREEZABLE), trained=st.booleans())
    def freeze(self, part: str, trained: bool) -> None:
        def step(model: nn.Module) -> None:
            for parameter in frozen_part(model, part):
                parameter.requires_grad_(trained)

        self.change(step)

    @rule(part=st.sampled_from(FREEZABLE), how=st.sampled_from(SWAPS))
    def swap_weights(self, part: str, how: str) -> None:
        factor = 1.25 if self.pair.steps % 2 else 0.8
        if how == "swap_tensors" and self.graph_lives:
            how = "assign"
        gc.collect()  # swap_tensors refuses tensors to which a graph still refers
        self.change(lambda model: change_weights(model, part, how, factor))

    @rule(size=st.sampled_from((140, 120)))
    def resize_embeddings(self, size: int) -> None:
        gc.collect()  # a graph that is still alive keeps the old shape, and then PyTorch refuses the new gradient
        self.change(lambda model: core_of(model).resize_token_embeddings(size, mean_resizing=False) and None)

    @precondition(lambda self: self.name != "mixtral")  # a rounding may choose another expert
    @rule(dtype=st.sampled_from((torch.bfloat16, torch.float32, torch.float64)))
    def change_dtype(self, dtype: torch.dtype) -> None:
        self.go_on_with(lambda model: model.to(dtype))
        self.pair.tolerance = max(self.pair.tolerance, TOLERANCE[dtype])

    @rule(how=st.sampled_from(("non-reentrant", "reentrant", "off")))
    def checkpointing(self, how: str) -> None:
        def step(model: nn.Module) -> None:
            if how == "off":
                core_of(model).activation_checkpointing_disable()
            else:
                core_of(model).activation_checkpointing_enable({"use_reentrant": how == "reentrant"})

        self.change(step)

    @rule(how=st.sampled_from(("deepcopy", "pickle", "save and load", "torch.save")))
    def go_on_with_a_copy(self, how: str) -> None:
        def step(model: nn.Module) -> nn.Module:
            if how == "deepcopy":
                return copy.deepcopy(model)
            if how == "pickle":
                return pickle.loads(pickle.dumps(model))
            with tempfile.TemporaryDirectory() as folder:
                if how == "torch.save":
                    torch.save(model, f"{folder}/model.pt")
                    return torch.load(f"{folder}/model.pt", weights_only=False)
                if isinstance(model, PeftModel):
                    raise ValueError("an adapter is loaded into a base model")
                model.save_pretrained(folder)
                return type(model).from_pretrained(folder)

        self.go_on_with(step)

    @rule()
    def free_a_copy(self) -> None:
        """A copy that nobody refers to any more is freed at once."""

        def step(model: nn.Module) -> bool:
            twin = copy.deepcopy(model)
            weight = weakref.ref(next(twin.parameters()))
            gc.disable()
            del twin
            alive = weight() is not None
            gc.enable()
            return alive

        self.pair.same(step)

    @precondition(lambda self: not isinstance(self.pair.plain, PeftModel))
    @rule(
        kind=st.sampled_from(
            ("attention", "mlp", "head", "saved head", "saved norm", "dora", "dropout", "ia3", "prompt")
        )
    )
    def wrap_by_peft(self, kind: str) -> None:
        self.go_on_with(lambda model: get_peft_model(model, adapter(kind, self.name)))

    @precondition(lambda self: isinstance(self.pair.plain, PeftModel))
    @rule(
        how=st.sampled_from(
            ("add", "add with head", "set first", "set second", "delete", "merge", "unmerge", "layers off", "layers on")
        )
    )
    def change_adapters(self, how: str) -> None:
        steps: dict[str, Callable[[Any], Any]] = {
            "add": lambda model: model.add_adapter("second", adapter("mlp", self.name)),
            "add with head": lambda model: model.add_adapter("second", adapter("saved head", self.name)),
            "set first": lambda model: model.set_adapter("default"),
            "set second": lambda model: model.set_adapter("second"),
            "delete": lambda model: model.delete_adapter("default"),
            "merge": lambda model: model.merge_adapter(),
            "unmerge": lambda model: model.unmerge_adapter(),
            "layers off": lambda model: model.base_model.disable_adapter_layers(),
            "layers on": lambda model: model.base_model.enable_adapter_layers(),
        }
        self.change(steps[how])

    @precondition(lambda self: isinstance(self.pair.plain, PeftModel))
    @rule(batch=simple_batches, context=contexts)
    def evaluate_without_adapters(self, batch: Batch, context: str) -> None:
        def step(model: Any) -> dict[str, Any]:
            with evaluation(model, context), model.disable_adapter():
                loss, logits = batch.call(model)
                return {"loss": loss, "values": logits.clone()}

        self.compare_evaluation(batch, context, step)

    @precondition(lambda self: isinstance(self.pair.plain, PeftModel))
    @rule(how=st.sampled_from(("merge_and_unload", "unload")))
    def leave_peft(self, how: str) -> None:
        self.go_on_with(lambda model: getattr(model, how)())


def adapter(kind: str, model_name: str) -> Any:
    attention, mlp = (
        (["c_attn"], ["c_fc"]) if model_name == "gpt2" else (["q_proj", "v_proj"], ["gate_proj", "down_proj"])
    )
    if model_name == "mixtral":
        mlp = ["o_proj"]
    if kind == "ia3":
        return IA3Config(
            task_type="CAUSAL_LM", target_modules=attention, feedforward_modules=[], init_ia3_weights=False
        )
    if kind == "prompt":
        return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    options: dict[str, Any] = {
        "attention": {},
        "mlp": {"target_modules": mlp},
        "head": {"target_modules": [*attention, "lm_head"]},
        "saved head": {"modules_to_save": ["lm_head"]},
        "saved norm": {"modules_to_save": ["ln_f" if model_name == "gpt2" else "norm"]},
        "dora": {"use_dora": True},
        "dropout": {"lora_dropout": 0.2},
    }[kind]
    return LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": attention, "init_lora_weights": False} | options
    )
