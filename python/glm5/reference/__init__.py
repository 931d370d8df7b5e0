"""The specification: every op of ``glm5.ops`` in plain, dense PyTorch, of the same name and signature.

Slow on purpose and free of tricks; any float dtype, float64 included. Kernel authors test against these.
"""

from glm5.reference.norm import rms_norm

__all__ = ["rms_norm"]
