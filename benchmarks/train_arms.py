"""The arms of the training benchmark: what each changes in a recipe, and in the Trainer that the recipe builds.

Nothing heavy is imported here before an arm needs it: a command line lists the arms, and a process that waits for the
device must not touch it.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field

# Modules that do an arm's slow imports, by package; they leave the device alone.
IMPORTS = {"trl": "trl.trainer.utils", "liger_kernel": "liger_kernel.transformers"}
HEADLESS = {"fused_linear_cross_entropy": False, "cross_entropy": False}  # liger-kernel's layers alone


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        overrides: recipe keys, which win against the recipe's and the suite's.
        packages: what has to be installed; an arm whose packages are not is a row that says so.
        prepare: called with the Trainer that the recipe built, before it trains.
        arguments: fields of the Trainer's arguments that no command line can give, such as dicts.
    """

    overrides: dict
    packages: tuple[str, ...] = ()
    prepare: Callable = field(default=lambda trainer: None)
    arguments: dict = field(default_factory=dict)

    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def import_packages(self) -> None:
        """Do the slow imports."""
        for name in self.packages:
            importlib.import_module(IMPORTS[name])


def add_trl_head(trainer) -> None:
    """Compute the loss in TRL's fused head, under the stock Trainer as well."""
    from trl.trainer.utils import add_fused_lm_head

    model = trainer.model
    add_fused_lm_head(model)
    headed = model.forward

    # TRL's own trainers pass the flag in compute_loss; under the stock Trainer nobody would. The signature has to stay
    # visible: the Trainer drops the columns of the data that forward does not name.
    @functools.wraps(headed)
    def forward(*args, **kwargs):
        return headed(*args, fused_lm_head=True, **kwargs)

    model.forward = forward


def use_liger_kernel_in_medusa(trainer) -> None:
    """For a model with Medusa heads, liger-kernel's layers in the LM and its fused loss for each head.

    The Trainer's own flag does not know this model and leaves it alone; any other model it has patched already.
    """
    model = trainer.model
    if not hasattr(model, "medusa_heads"):
        return
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model.lm)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    model.head_loss = lambda hidden, weight, labels: loss(weight, hidden, labels)


ARMS = {
    "hf": Arm({"use_liger": False}),
    "ours": Arm({"use_liger": True}),
    "liger": Arm({"use_liger": False, "use_liger_kernel": True}, ("liger_kernel",), use_liger_kernel_in_medusa),
    "trl_head": Arm({"use_liger": False}, ("trl",), add_trl_head),
    "liger_trl_head": Arm(
        {"use_liger": False, "use_liger_kernel": True},
        ("trl", "liger_kernel"),
        add_trl_head,
        {"liger_kernel_config": HEADLESS},
    ),
    "compile": Arm({"use_liger": False, "torch_compile": True}),
    "ours_compile": Arm({"use_liger": True, "torch_compile": True}),
}
