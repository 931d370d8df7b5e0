"""glm5: the GLM-5 system as a Python package. Submodules load on first use: ``import glm5.ops`` needs torch alone."""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {"Glm5Config": "glm5.model", "Glm5ForCausalLM": "glm5.model"}


def __getattr__(name):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'glm5' has no attribute {name!r}")
