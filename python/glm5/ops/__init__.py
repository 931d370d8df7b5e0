"""The ops: one public function each, on the compiled kernels of the ``glm5`` torch library.

Each has a dense specification of the same name and signature in ``glm5.reference``.
"""

from glm5.ops.norm import rms_norm

__all__ = ["rms_norm"]
