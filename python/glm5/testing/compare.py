"""How two results are compared: as bits, or as numbers within an error budget. Knows nothing about any op."""

import torch

# ||out - ref|| / ||ref|| against float64 on the same (already rounded) inputs: (forward, backward).
BUDGETS = {
    "exact": {torch.bfloat16: (3e-3, 5e-3), torch.float32: (1e-6, 1e-6), torch.float64: (1e-13, 1e-12)},
    # Scores are float32 whatever their inputs are; gradients have their input's dtype.
    "scores": {
        torch.bfloat16: (1e-6, 5e-3),
        torch.float32: (1e-6, 1e-6),
        torch.float64: (1e-13, 1e-12),
        torch.float8_e4m3fn: (1e-6, 0.0),
        torch.int8: (1e-6, 0.0),
    },
    # Products of quantised matrices, against those of the dequantised ones; by the output's dtype.
    "quantized": {torch.bfloat16: (2.5e-3, 0.0), torch.float32: (1e-4, 0.0)},
    "softmax": {torch.bfloat16: (3e-3, 5e-3), torch.float32: (5e-6, 5e-6), torch.float64: (1e-13, 1e-12)},
}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes (so -0.0 differs from 0.0, and NaN equals itself)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # A clone, not contiguous(): that leaves a single element its stride, which forbids the view.
    a, b = (t.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in float64; infinities must agree in place and sign; 0 for two empty or all-zero tensors."""
    got, want = got.detach().double().flatten(), want.detach().double().flatten()
    if got.shape != want.shape:
        return float("inf")
    finite = torch.isfinite(want)
    if not torch.equal(finite, torch.isfinite(got)) or not torch.equal(
        got[~finite].nan_to_num(), want[~finite].nan_to_num()
    ):
        return float("inf")
    difference, size = (got - want)[finite].norm().item(), want[finite].norm().item()
    return difference / size if size > 0 else difference


def allowed_error(budget: float, output: torch.Tensor) -> float:
    """``budget`` speaks of many numbers. Where there are few they may all be small by cancellation: less than 64 are allowed
    8 budgets; in bf16 two halves of the last place, for a result that was rounded twice."""
    if output.numel() >= 64:
        return budget
    return max(budget, 2.0**-7) if output.dtype == torch.bfloat16 else 8 * budget
