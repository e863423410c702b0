"""``model.num_parameters``, asked for at every batch and answered once.

transformers' Trainer counts the parameters of the whole model for every micro-batch, to log ``total_flos``. It does so
just after it waited for the loss, so the GPU has nothing to do meanwhile: 3.3 ms of a 134 ms step for a Llama of 1B
parameters on an H100 (benchmarks/NOTES.md). The number does not change while a model is in training.
"""

from torch import nn


class CountedOnce:
    """Stands for ``num_parameters`` on one model; remembers the counts that do not depend on ``requires_grad``."""

    def __init__(self, count):
        self.count, self.known = count, {}

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As the model's own method."""
        if only_trainable:
            return self.count(only_trainable=True, exclude_embeddings=exclude_embeddings)
        if exclude_embeddings not in self.known:
            self.known[exclude_embeddings] = self.count(exclude_embeddings=exclude_embeddings)
        return self.known[exclude_embeddings]


def count_once(model: nn.Module) -> None:
    """Let ``model.num_parameters``, where there is one, remember its answers from now on."""
    forget_count(model)
    if hasattr(model, "num_parameters"):
        model.num_parameters = CountedOnce(model.num_parameters)


def forget_count(model: nn.Module) -> None:
    """Give ``model`` its own method back."""
    if isinstance(model.__dict__.get("num_parameters"), CountedOnce):
        del model.num_parameters
