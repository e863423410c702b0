"""RMSNorm and LayerNorm as modules. They are subclasses of torch's, so code that looks for norms finds them."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.layer_norm import layer_norm
from ..kernels.rms_norm import rms_norm


def _width(name: str, value: int | Sequence[int]) -> int:
    """The one dimension that is normalised."""
    sizes = (value,) if isinstance(value, int) else tuple(value)
    if len(sizes) != 1 or sizes[0] < 1:
        raise ValueError(f"{name}: got {value}; must be one positive number, the size of the last dimension")
    return sizes[0]


def _check_last(x: Tensor, width: int) -> None:
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(f"x: got shape {tuple(x.shape)}; must be [..., {width}]")


class LigerRMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv 1910.07467) over the last dimension, by ``liger_trainer.kernels.rms_norm``.

    State dicts are those of ``torch.nn.RMSNorm`` and of transformers' ``LlamaRMSNorm`` and its like.

    Args:
        hidden_size: size of the last dimension, a number or a sequence of one.
        eps: added to the mean square; with ``None``, the machine epsilon of the input's dtype, as in torch.
        elementwise_affine: whether there is a weight.
        device, dtype: of the weight.
        weight_offset: added to the weight, which starts at 1 minus this: 1.0 for the Gemma family.
        scale_in_fp32: multiply by the weight before rounding to a 16-bit dtype (torch, Gemma), not after (Llama).

    Raises:
        ValueError: ``hidden_size`` is not one positive number.
    """

    def __init__(
        self,
        hidden_size: int | Sequence[int],
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight_offset: float = 0.0,
        scale_in_fp32: bool = False,
    ) -> None:
        self.weight_offset, self.scale_in_fp32 = weight_offset, scale_in_fp32
        super().__init__(_width("hidden_size", hidden_size), eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        """Set the weight to what, with the offset, is 1."""
        if self.elementwise_affine:
            nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` ``[..., hidden_size]``; shapes and dtypes as in ``rms_norm``."""
        _check_last(x, self.normalized_shape[0])
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return rms_norm(x, self.weight, eps, weight_offset=self.weight_offset, scale_in_fp32=self.scale_in_fp32)


class LigerLayerNorm(nn.LayerNorm):
    """LayerNorm (arXiv 1607.06450) over the last dimension, by ``liger_trainer.kernels.layer_norm``.

    Arguments and state dicts are those of ``torch.nn.LayerNorm``.

    Args:
        normalized_shape: size of the last dimension, a number or a sequence of one.
        eps: added to the variance.
        elementwise_affine: whether there is a weight.
        bias: whether there is a bias too.
        device, dtype: of weight and bias.

    Raises:
        ValueError: ``normalized_shape`` is not one positive number.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        width = _width("normalized_shape", normalized_shape)
        super().__init__(width, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``input`` ``[..., normalized_shape]``; shapes and dtypes as in ``layer_norm``."""
        _check_last(input, self.normalized_shape[0])
        return layer_norm(input, self.weight, self.bias, self.eps)
