"""An unpatched and a patched copy of one model: the same action on both must give the same result."""

import contextlib
import copy
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from liger_trainer import apply_liger, revert_liger
from liger_trainer.patching import patch_state

# Relative error allowed, by the narrowest dtype that the model has computed in.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 6e-2}


class Difference(AssertionError):
    """The patched model did something else than the unpatched one."""


def core_of(model: nn.Module) -> Any:
    """The transformers model inside ``model``; PEFT's own ``get_base_model`` fails without an active adapter."""
    if not isinstance(model, PeftModel):
        return model
    return model.base_model.model if isinstance(model.base_model, BaseTuner) else model.base_model


class ModelPair:
    """``plain`` is never patched; ``ours`` is what ``apply_liger`` and ``revert_liger`` act on.

    ``steps`` counts the actions and seeds the random numbers of each, so that dropout agrees on both sides.
    """

    def __init__(self, model: nn.Module):
        self.plain: nn.Module = model
        self.ours: nn.Module = copy.deepcopy(model)
        self.steps: int = 0
        self.tolerance: float = TOLERANCE[torch.float32]

    @property
    def models(self) -> tuple[nn.Module, nn.Module]:
        """The unpatched and the patched model."""
        return self.plain, self.ours

    @property
    def is_patched(self) -> bool:
        """Whether ``ours`` is patched at the moment."""
        return patch_state(self.ours) is not None

    def apply(self, config: dict[str, Any]) -> None:
        """Patch ``ours``; as users must, revert first if it is patched with another config.

        Without un-padding, which changes logits at padding and random numbers of dropout by design.
        """
        config = {"unpad": False, **config}
        state = patch_state(self.ours)
        if state is not None and any(getattr(state.config, name) != value for name, value in config.items()):
            revert_liger(self.ours)
        if patch_state(self.ours) is None:
            apply_liger(self.ours, config)
        else:
            apply_liger(self.ours, patch_state(self.ours).config)

    def revert(self) -> None:
        """Unpatch ``ours`` and check that nothing of the patch is left on any module."""
        revert_liger(self.ours)
        for (name, theirs), (_, ours) in zip(self.plain.named_modules(), self.ours.named_modules(), strict=True):
            if vars(theirs).keys() != vars(ours).keys():
                raise Difference(f"attributes of {name}: {sorted(vars(theirs).keys() ^ vars(ours).keys())}")
            for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                if len(getattr(theirs, hooks)) != len(getattr(ours, hooks)):
                    raise Difference(f"{name} has other {hooks}")

    def both(
        self, action: Callable[[nn.Module], Any], promised: Sequence[str] = (), patched_may_do_more: bool = False
    ) -> tuple[Any, Any] | None:
        """The results of ``action`` on the unpatched and the patched model, or None where both raised.

        Args:
            action: called with either model.
            promised: patterns of errors that only the patched model may raise, because the documentation says so;
                the result is None then, too.
            patched_may_do_more: the unpatched model alone may raise an error; the result is None then, too.

        Raises:
            Difference: only one of the two raised an error.
        """
        self.steps += 1
        (theirs, their_error), (ours, our_error) = (self._attempt(action, model) for model in self.models)
        if our_error is not None and (
            their_error is not None or any(re.search(pattern, str(our_error)) for pattern in promised)
        ):
            return None
        if our_error is not None:
            raise Difference(
                f"only the patched model raised {type(our_error).__name__}: {str(our_error)[:300]}"
            ) from our_error
        if their_error is not None and patched_may_do_more:
            return None
        if their_error is not None:
            raise Difference(
                f"only the unpatched model raised {type(their_error).__name__}: {str(their_error)[:300]}"
            ) from their_error
        return theirs, ours

    def same(
        self, action: Callable[[nn.Module], Any], promised: Sequence[str] = (), tolerance: float | None = None
    ) -> Any:
        """Run ``action`` on both and compare what it returns; the unpatched model's result, or None after an error."""
        results = self.both(action, promised)
        if results is None:
            return None
        compare("result", *results, tolerance or self.tolerance)
        return results[0]

    def replace(self, action: Callable[[nn.Module], nn.Module]) -> bool:
        """Go on with the models that ``action`` returns; False where it raised on both sides."""
        results = self.both(action)
        if results is not None:
            self.plain, self.ours = results
        return results is not None

    def forget_gradients(self) -> None:
        """Drop all gradients."""
        for model in self.models:
            model.zero_grad(set_to_none=True)

    def _attempt(self, action: Callable[[nn.Module], Any], model: nn.Module) -> tuple[Any, Exception | None]:
        torch.default_generator.manual_seed(self.steps)  # torch.manual_seed takes as long as a forward
        try:
            return action(model), None
        except Exception as error:
            # What the frames hold, graphs and weights, would live on as long as the error.
            cause: BaseException | None = error
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__cause__ or cause.__context__
            return None, error


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients that are there, by the parameters' names."""
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(name: str, theirs: Any, ours: Any, tolerance: float) -> None:
    """Raise ``Difference`` unless two results agree: numbers to ``tolerance`` of the largest value, all else exactly.

    Tensors of a ``Gradients`` dict are compared by norm: one that is zero but for rounding counts by the others' size.
    """
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if theirs.keys() != ours.keys():
            raise Difference(f"{name}: {sorted(theirs.keys() ^ ours.keys())} only on one side")
        if name.endswith("gradients"):
            _compare_gradients(name, theirs, ours, tolerance)
        else:
            for key, value in theirs.items():
                compare(f"{name}.{key}", value, ours[key], tolerance)
    elif isinstance(theirs, list | tuple) and isinstance(ours, list | tuple):
        if len(theirs) != len(ours):
            raise Difference(f"{name}: {len(ours)} values on the patched side, {len(theirs)} on the other")
        for index, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            compare(f"{name}[{index}]", a, b, tolerance)
    elif torch.is_tensor(theirs) and torch.is_tensor(ours):
        _compare_tensors(name, theirs, ours, tolerance)
    elif isinstance(theirs, float) and isinstance(ours, float):
        _compare_tensors(name, torch.tensor(theirs), torch.tensor(ours), tolerance)
    elif type(theirs) is not type(ours) or theirs != ours:
        raise Difference(f"{name}: unpatched {theirs!r}, patched {ours!r}")


def _compare_tensors(name: str, theirs: Tensor, ours: Tensor, tolerance: float) -> None:
    if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
        form = f"unpatched {tuple(theirs.shape)} {theirs.dtype}, patched {tuple(ours.shape)} {ours.dtype}"
        raise Difference(f"{name}: {form}")
    a, b = theirs.detach().double(), ours.detach().double()
    if not theirs.is_floating_point():
        if not torch.equal(a, b):
            raise Difference(f"{name}: other integers")
        return
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        raise Difference(f"{name}: infinite or NaN elsewhere (unpatched {_brief(a)}, patched {_brief(b)})")
    if finite.any():
        error = (a - b)[finite].abs().max() / a[finite].abs().max().clamp(min=1e-6)
        if error > tolerance:
            raise Difference(f"{name}: relative error {error:.1e} (unpatched {_brief(a)}, patched {_brief(b)})")


def _compare_gradients(name: str, theirs: dict[str, Tensor], ours: dict[str, Tensor], tolerance: float) -> None:
    largest = max((g.double().nan_to_num().norm().item() for g in theirs.values()), default=0.0)
    for key, gradient in theirs.items():
        if gradient.dtype != ours[key].dtype or gradient.shape != ours[key].shape:
            raise Difference(f"{name} of {key}: other shape or dtype")
        if not torch.equal(gradient.isnan(), ours[key].isnan()):
            raise Difference(f"{name} of {key}: NaN elsewhere")
        error = (gradient.double() - ours[key].double()).nan_to_num().norm().item()
        norm = max(gradient.double().nan_to_num().norm().item(), 1e-2 * largest, 1e-6)
        if not error <= tolerance * norm:
            other = ours[key].double().norm().item()
            raise Difference(
                f"{name} of {key}: relative error {error / norm:.1e} (norm unpatched {norm:.3g}, patched {other:.3g})"
            )


def _brief(values: Tensor) -> str:
    return f"{values.item():.6g}" if values.numel() == 1 else f"norm {values.norm().item():.6g}"


@contextlib.contextmanager
def evaluation(model: nn.Module, context: str):
    """The model in evaluation mode (or, with "train mode", as it is in training) without or with gradients."""
    contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
    model.train(context == "train mode")
    with contexts.get(context, torch.no_grad)():
        yield
