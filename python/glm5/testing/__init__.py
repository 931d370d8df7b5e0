"""The conformance kit: draw inputs for an op, run it beside its float64 reference, judge the result by its error budget.

``check("rms_norm")`` judges ours; ``check("rms_norm", impl=mine)`` judges yours. The same specs drive the test suite.
"""

from glm5.testing.spec import Draw, OpSpec, RandomDraw, Report, check, relative_error, same_bits, spec, specs

__all__ = ["Draw", "OpSpec", "RandomDraw", "Report", "check", "relative_error", "same_bits", "spec", "specs"]
