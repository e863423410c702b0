"""``model.num_parameters``, asked for at every batch and answered once.

transformers' Trainer counts the parameters of the whole model for every micro-batch, to log ``total_flos``. It does so
just after it waited for the loss, so the GPU has nothing to do meanwhile: 3.3 ms of a 134 ms step for a Llama of 1B
parameters on an H100 (benchmarks/NOTES.md). The number does not change while a model is in training.
"""

from torch import nn


class CountedOnce:
    """Stands for ``num_parameters`` on one model; remembers the counts that do not depend on ``requires_grad``.

    After training that ended in an exception it is still there: what it knows is forgotten when the embeddings change.
    """

    def __init__(self, model: nn.Module):
        self.model, self.count, self.known, self.embeddings = model, model.num_parameters, {}, None

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As the model's own method."""
        if only_trainable:
            return self.count(only_trainable=True, exclude_embeddings=exclude_embeddings)
        weight = self.model.get_input_embeddings().weight
        if self.embeddings is not weight:
            self.embeddings, self.known = weight, {}
        if exclude_embeddings not in self.known:
            self.known[exclude_embeddings] = self.count(exclude_embeddings=exclude_embeddings)
        return self.known[exclude_embeddings]


def count_once(model: nn.Module) -> None:
    """Let ``model.num_parameters``, where there is one, remember its answers from now on."""
    forget_count(model)
    if hasattr(model, "num_parameters") and hasattr(model, "get_input_embeddings"):
        model.num_parameters = CountedOnce(model)


def forget_count(model: nn.Module) -> None:
    """Give ``model`` its own method back."""
    if isinstance(model.__dict__.get("num_parameters"), CountedOnce):
        del model.num_parameters
