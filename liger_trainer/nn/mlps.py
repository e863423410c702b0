"""Gated MLPs as modules, with the parameters of those in transformers' decoder layers."""

from typing import Any

from torch import Tensor, nn

from ..kernels.geglu import geglu
from ..kernels.swiglu import swiglu

SWIGLU_NAMES = ("silu", "swish")
GEGLU_NAMES = {"gelu_pytorch_tanh": "tanh", "gelu_new": "tanh", "gelu": "none"}  # -> ``approximate``


def _activation(config: Any, allowed: tuple[str, ...]) -> str:
    """The name of the activation in ``config``, checked."""
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if name not in allowed:
        raise ValueError(f"config.hidden_act: got {name!r}; must be one of {', '.join(map(repr, allowed))}")
    return name


class _GatedMLP(nn.Module):
    """``down_proj(act(gate_proj(x)) * up_proj(x))``; a subclass says how the middle is computed."""

    def __init__(self, config: Any, intermediate_size: int | None) -> None:
        super().__init__()
        self.config = config
        self.hidden_size: int = config.hidden_size
        self.intermediate_size: int = config.intermediate_size if intermediate_size is None else intermediate_size
        bias = bool(getattr(config, "mlp_bias", False))
        self.gate_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.up_proj = nn.Linear(self.hidden_size, self.intermediate_size, bias=bias)
        self.down_proj = nn.Linear(self.intermediate_size, self.hidden_size, bias=bias)


class LigerSwiGLUMLP(_GatedMLP):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` (arXiv 2002.05202), by ``liger_trainer.kernels.swiglu``.

    State dicts are those of transformers' ``LlamaMLP``, ``Qwen2MLP``, ``MistralMLP`` and their like.

    Args:
        config: has ``hidden_size``, ``intermediate_size``, ``hidden_act`` ("silu" or "swish") and perhaps ``mlp_bias``,
            as a config of transformers does.
        intermediate_size: replaces that of the config.

    Raises:
        ValueError: another activation.
    """

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        _activation(config, SWIGLU_NAMES)
        super().__init__(config, intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class LigerGEGLUMLP(_GatedMLP):
    """``down_proj(gelu(gate_proj(x)) * up_proj(x))`` (arXiv 2002.05202), by ``liger_trainer.kernels.geglu``.

    State dicts are those of transformers' ``GemmaMLP``, ``Gemma2MLP`` and their like.

    Args:
        config: has ``hidden_size``, ``intermediate_size``, perhaps ``mlp_bias``, and ``hidden_activation`` or
            ``hidden_act`` ("gelu_pytorch_tanh", "gelu_new" or, exact, "gelu"), as a config of transformers does.
        intermediate_size: replaces that of the config.

    Raises:
        ValueError: another activation.
    """

    def __init__(self, config: Any, intermediate_size: int | None = None) -> None:
        approximate = GEGLU_NAMES[_activation(config, tuple(GEGLU_NAMES))]
        super().__init__(config, intermediate_size)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same."""
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x), approximate=self.approximate))
