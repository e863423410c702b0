"""The arms of the training benchmark: what each changes in a recipe, and in the Trainer that the recipe builds.

Nothing heavy is imported here before an arm needs it: a command line lists the arms, and a process that waits for the
device must not touch it.
"""

import functools
import importlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

Evidence = Callable[[], dict]  # called after training

# Modules that do an arm's slow imports, by package; they leave the device alone.
IMPORTS = {"trl": "trl.trainer.utils", "liger_kernel": "liger_kernel.transformers"}
HEADLESS = {"fused_linear_cross_entropy": False, "cross_entropy": False}  # liger-kernel's layers alone


def nothing(trainer) -> Evidence:
    """Leave the Trainer as it is; nothing is to be shown."""
    return dict


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        overrides: recipe keys, which win against the recipe's and the suite's.
        packages: what has to be installed; an arm whose packages are not is a row that says so.
        prepare: called with the Trainer that the recipe built, before it trains. Returns what to call afterwards for
            evidence that the arm was active: a dict without a value that is zero or empty, or it was not.
        arguments: fields of the Trainer's arguments that no command line can give, such as dicts.
    """

    overrides: dict
    packages: tuple[str, ...] = ()
    prepare: Callable[..., Evidence] = nothing
    arguments: dict = field(default_factory=dict)

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def import_packages(self) -> None:
        """Do the slow imports."""
        for name in self.packages:
            importlib.import_module(IMPORTS[name])


def report_of_ours(trainer) -> Evidence:
    """What ``use_liger`` has replaced, and how often the fused loss was computed."""

    def evidence() -> dict:
        from liger_trainer.patching import patch_state

        state = patch_state(trainer.model)
        if state is None:
            return {"replaced": {}}
        heads = [head for head in (state.fused, state.trl_head) if head is not None]
        return {"replaced": state.report.counts, "fused_loss_calls": sum(head.calls_fused for head in heads)}

    return evidence


def report_of_low_memory(trainer) -> Evidence:
    """The same, and that the option was on."""
    ours = report_of_ours(trainer)

    def evidence() -> dict:
        from liger_trainer.patching import patch_state

        return ours() | {"low_memory": patch_state(trainer.model).config.low_memory}

    return evidence


def compiled(trainer) -> Evidence:
    """Whether ``torch_compile`` wrapped the model, and how many graphs were compiled."""

    def evidence() -> dict:
        from torch._dynamo.eval_frame import OptimizedModule
        from torch._dynamo.utils import counters

        wrapped = isinstance(trainer.model_wrapped, OptimizedModule)
        return {"compiled_model": wrapped, "compiled_graphs": counters["stats"]["unique_graphs"]}

    return evidence


def compiled_ours(trainer) -> Evidence:
    """Both."""
    ours, graphs = report_of_ours(trainer), compiled(trainer)
    return lambda: ours() | graphs()


def modules_of_liger_kernel(model) -> dict[str, int]:
    """How many modules of each class run a forward of liger-kernel's."""
    forwards = ((module, getattr(module.forward, "__func__", module.forward)) for module in model.modules())
    return dict(
        Counter(
            type(module).__name__
            for module, forward in forwards
            if str(getattr(forward, "__module__", "")).startswith("liger_kernel")
        )
    )


def add_trl_head(trainer) -> Evidence:
    """Compute the loss in TRL's fused head, under the stock Trainer as well."""
    from trl.trainer.utils import add_fused_lm_head

    model, calls = trainer.model, Counter()
    add_fused_lm_head(model)
    headed = model.forward

    # TRL's own trainers pass the flag in compute_loss; under the stock Trainer nobody would. The signature has to stay
    # visible: the Trainer drops the columns of the data that forward does not name.
    @functools.wraps(headed)
    def forward(*args, **kwargs):
        output = headed(*args, fused_lm_head=True, **kwargs)
        calls["all"] += "log_probs" in output  # a field that the model's own output does not have
        return output

    model.forward = forward
    return lambda: {"trl_head_calls": calls["all"]}


def use_liger_kernel(trainer) -> Evidence:
    """For a model with Medusa heads, liger-kernel's layers in the LM and its fused loss for each head.

    The Trainer's own flag does not know this model and leaves it alone; any other model it has patched already.
    """
    model, calls = trainer.model, Counter()
    if not hasattr(model, "medusa_heads"):
        return lambda: {"liger_kernel_modules": modules_of_liger_kernel(model)}
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model.lm)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")

    def head_loss(hidden, weight, labels):
        calls["all"] += 1
        return loss(weight, hidden, labels)

    model.head_loss = head_loss
    return lambda: {"liger_kernel_modules": modules_of_liger_kernel(model), "head_loss_calls": calls["all"]}


def use_liger_kernel_and_trl_head(trainer) -> Evidence:
    """Both."""
    layers, head = use_liger_kernel(trainer), add_trl_head(trainer)
    return lambda: layers() | head()


ARMS = {
    "hf": Arm({"use_liger": False}),
    "ours": Arm({"use_liger": True}, prepare=report_of_ours),
    "ours_low_memory": Arm({"use_liger": True, "liger_config": '{"low_memory": true}'}, prepare=report_of_low_memory),
    "liger": Arm({"use_liger": False, "use_liger_kernel": True}, ("liger_kernel",), use_liger_kernel),
    "trl_head": Arm({"use_liger": False}, ("trl",), add_trl_head),
    "liger_trl_head": Arm(
        {"use_liger": False, "use_liger_kernel": True},
        ("trl", "liger_kernel"),
        use_liger_kernel_and_trl_head,
        {"liger_kernel_config": HEADLESS},
    ),
    "compile": Arm({"use_liger": False, "torch_compile": True}, prepare=compiled),
    "ours_compile": Arm({"use_liger": True, "torch_compile": True}, prepare=compiled_ours),
}
