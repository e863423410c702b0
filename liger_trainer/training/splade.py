"""Training of a sparse retriever from a recipe: pairs of a question and its document, by SPLADE's loss.

Both are embedded by a masked language model and ``linear_splade``. Each question's document must score higher than the
batch's others, and the mean use of each vocabulary entry is kept low (the FLOPS regulariser of arXiv 2109.10086, whose
weight grows with the square of the steps during the first third of them, so that it does not empty all rows). The
saved model is the masked language model, which a SparseEncoder of sentence-transformers loads.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from ..kernels.linear_splade import linear_splade
from ..splade import HiddenProjection, projection_of
from .recipe import Recipe
from .recipe_arguments import RecipeError


class SpladeTrainer(Trainer):
    """A Trainer whose batches are questions, then as many documents.

    Args:
        model: The masked language model.
        flops_weight: Weight of the regulariser.
        score_scale: Factor of the scores in the loss.
        fused: Compute the embeddings without logits.
        **kwargs: As of the Trainer.
    """

    def __init__(self, model: PreTrainedModel, *, flops_weight: float, score_scale: float, fused: bool, **kwargs: Any):
        super().__init__(model, **kwargs)
        self.flops_weight, self.score_scale, self.fused = flops_weight, score_scale, fused
        self.hidden, self.projection = HiddenProjection(), projection_of(model)
        if fused:
            self.hidden.replace(self.projection)
        self.sums: list[Tensor] = []

    def embed(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """The representations ``[rows, vocabulary]`` of rows of tokens."""
        if not self.fused:
            scores = model(**inputs).logits.relu().log1p()
            return (scores * inputs["attention_mask"].unsqueeze(-1)).max(dim=1).values
        with self.hidden.handed_on():
            hidden = model(**inputs).logits
        return linear_splade(hidden, self.projection.weight, self.projection.bias, inputs["attention_mask"])

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The ranking loss plus the regulariser."""
        questions, documents = self.embed(model, inputs).chunk(2)
        scores = questions @ documents.t() * self.score_scale
        targets = torch.arange(len(scores), device=scores.device)
        flops = questions.mean(0).square().sum() + documents.mean(0).square().sum()
        right = (scores.argmax(1) == targets).float().mean()
        self.sums.append(torch.stack([right, (documents > 0).sum(1).float().mean()]).detach())
        ramp = min(1.0, (self.state.global_step + 1) / max(1, self.state.max_steps // 3)) ** 2
        return F.cross_entropy(scores, targets) + ramp * self.flops_weight * flops

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the share of questions whose document comes first, and how many entries a document uses."""
        if self.sums and "loss" in logs:
            accuracy, active = torch.stack(self.sums).mean(0).tolist()
            logs.update(accuracy=accuracy, active_entries=active)
            self.sums = []
        super().log(logs, *args, **kwargs)


def build(
    recipe: Recipe, dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> SpladeTrainer:
    """The trainer of a recipe whose rows have ``prompt`` and ``completion``.

    Raises:
        RecipeError: They have not, or the model has no vocabulary projection to take hidden states from.
    """
    first = next(iter(dataset))
    if not all(isinstance(first.get(name), str) for name in ("prompt", "completion")):
        raise RecipeError(f"dataset: got columns {', '.join(first)}; must be prompt and completion, the document")

    def collate(rows: list[dict[str, str]]) -> dict[str, Any]:
        texts = [row[name] for name in ("prompt", "completion") for row in rows]
        batch = tokenizer(
            texts, padding=True, truncation=True, max_length=recipe.max_length, return_tensors="pt",
            pad_to_multiple_of=recipe.pad_to_multiple_of, return_token_type_ids=False,
        )  # fmt: skip
        return dict(batch)

    recipe.training.remove_unused_columns = False
    try:
        return SpladeTrainer(
            model,
            flops_weight=recipe.run.flops_weight,
            score_scale=recipe.run.score_scale,
            fused=cast(Any, recipe.training).use_liger,
            args=recipe.training,
            train_dataset=dataset,
            data_collator=collate,
            processing_class=tokenizer,
        )
    except ValueError as error:
        raise RecipeError(str(error)) from error
