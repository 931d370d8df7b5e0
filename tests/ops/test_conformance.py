"""The conformance kit as a library: reports, strategies, and what it needs to run."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from glm5 import ops
from glm5.testing import PROPERTIES, ConformanceError, check, example, specs, strategies


def test_a_report_for_pytest():
    check("silu_mul", examples=2).raise_if_failed()
    report = check("silu_mul", impl=lambda x: ops.silu_mul(x) * 1.01, examples=2, properties=["accuracy", "aliasing"])
    assert not report.ok and report.failed == ["accuracy"] and report.verdicts["aliasing"].ok
    with pytest.raises(ConformanceError, match="silu_mul: fails accuracy"):
        report.raise_if_failed()


def test_whatever_an_implementation_raises_is_its_failure():
    def picky(x):
        raise KeyError("no kernel for this shape")

    report = check("silu_mul", impl=picky, examples=2)
    assert set(report.failed) == set(PROPERTIES) - {"ties"}
    assert "raised KeyError: 'no kernel for this shape'" in str(report)


def test_wrong_shapes_and_counts_are_named():
    report = check("silu_mul", impl=lambda x: x, examples=2, properties=["accuracy"])
    assert "output 0 has shape" in str(report)
    report = check("silu_mul", impl=lambda x: (ops.silu_mul(x), x.sum()), examples=2, properties=["accuracy"])
    assert "2 outputs, want 1" in str(report)


@pytest.mark.parametrize("name", sorted(specs()))
def test_a_seed_draws_the_same_inputs_again(name):
    op = specs()[name]
    for key, p in PROPERTIES.items():
        if not isinstance(p.trials(op), str):
            first, second = (example(name, key, op.dtypes[0], seed=3) for _ in range(2))
            assert first is None or first.keys() == second.keys()
            for k in first or ():
                same = torch.equal if isinstance(first[k], torch.Tensor) and not first[k].is_floating_point() else None
                assert same is None or same(first[k], second[k])


@settings(max_examples=5)
@given(strategies.topk_indices(torch.float32, "ties"), strategies.arguments("rope", torch.bfloat16))
def test_strategies(ties, any_arguments):
    assert ops.topk_indices(**ties).dtype == torch.int32
    assert ops.rope(**any_arguments).dtype == torch.bfloat16


def test_strategies_refuse_what_there_is_not():
    with pytest.raises(ValueError, match="no property 'speed'"):
        strategies.arguments("rope", torch.float32, "speed")
    with pytest.raises(ValueError, match="ties does not apply to rope"):
        strategies.arguments("rope", torch.float32, "ties")
    with pytest.raises(AttributeError):
        strategies.no_such_op  # noqa: B018


def test_it_runs_without_hypothesis_and_pytest():
    code = (
        "import sys; sys.modules['hypothesis'] = sys.modules['pytest'] = None; from glm5 import testing; "
        "sys.exit(not testing.check('silu_mul', examples=1, properties=['accuracy', 'row_invariance']).ok)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
