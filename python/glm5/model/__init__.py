"""The model: configuration, layers, the language model, its losses and simple generation. Uses nothing but ``glm5.ops``."""

from glm5.model.attention import Selection
from glm5.model.causal_lm import IGNORED, CausalLMOutput, Glm5ForCausalLM
from glm5.model.config import Glm5Config

__all__ = ["IGNORED", "CausalLMOutput", "Glm5Config", "Glm5ForCausalLM", "Selection"]
