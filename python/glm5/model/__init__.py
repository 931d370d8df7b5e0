"""The model: configuration, layers, the language model, its losses and simple generation. Uses nothing but ``glm5.ops``.

Its names load on first use: ``glm5.model.config`` and what only counts need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glm5.model.attention import Selection
    from glm5.model.causal_lm import IGNORED, CausalLMOutput, Glm5ForCausalLM
    from glm5.model.config import Glm5Config

__all__ = ["IGNORED", "CausalLMOutput", "Glm5Config", "Glm5ForCausalLM", "Selection"]

_MODULES = {"Glm5Config": "config", "Selection": "attention"}


def __getattr__(name):
    if name in __all__:
        return getattr(import_module(f"glm5.model.{_MODULES.get(name, 'causal_lm')}"), name)
    raise AttributeError(f"module 'glm5.model' has no attribute {name!r}")
