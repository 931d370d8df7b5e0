"""glm5: the GLM-5 system as a Python package. Submodules load on first use: ``import glm5.ops`` needs torch alone."""

import os
from importlib import import_module

__version__ = "0.1.0"

# Compiled libraries of another build (make sanitize) are found before those beside this file.
if _libraries := os.environ.get("GLM5_LIBRARY_DIR"):
    __path__.insert(0, _libraries)

_LAZY = {"Glm5Config": "glm5.model", "Glm5ForCausalLM": "glm5.model"}


def __getattr__(name):
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'glm5' has no attribute {name!r}")
