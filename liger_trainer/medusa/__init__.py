"""Medusa: extra decoding heads on a causal LM, their loss and the model that holds both."""

from .heads import MedusaConfig
from .model import MedusaModel

__all__ = ["MedusaConfig", "MedusaModel"]
