"""The conformance kit: draw inputs for an op, run it beside its float64 reference, judge the result property by property.

``check("rms_norm")`` judges ours; ``check("rms_norm", impl=mine)`` judges yours. The same specs and property functions drive
the test suite. ``glm5.testing.strategies`` gives the inputs to hypothesis; nothing else here needs it.
docs/bring-your-own-kernel.md is the guide.
"""

from glm5.testing.compare import BUDGETS, allowed_error, relative_error, same_bits
from glm5.testing.conformance import ConformanceError, Report, Verdict, check, example
from glm5.testing.judges import Candidate
from glm5.testing.properties import PROPERTIES, Property
from glm5.testing.spec import Draw, OpSpec, RandomDraw, spec, specs

__all__ = [
    "BUDGETS",
    "PROPERTIES",
    "Candidate",
    "ConformanceError",
    "Draw",
    "OpSpec",
    "Property",
    "RandomDraw",
    "Report",
    "Verdict",
    "allowed_error",
    "check",
    "example",
    "relative_error",
    "same_bits",
    "spec",
    "specs",
]
