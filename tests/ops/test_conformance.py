"""The conformance kit as a library: reports, strategies, and what it needs to run."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from glm5 import ops
from glm5.testing import PROPERTIES, ConformanceError, check, example, specs, strategies
from glm5.testing.lightning_indexer import paged_logits
from glm5.testing.spec import as_tuple
from tests.mutation.wrappers import higher_of_ties


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


def _by_the_number_of(t):
    return 1 + t.shape[0] % 2


UNEVEN = {
    "quantize_fp8": lambda x, block, power_of_two: ops.quantize_fp8(x * _by_the_number_of(x), block, power_of_two),
    "latent_cache_write": lambda rows, **rest: ops.latent_cache_write(rows * _by_the_number_of(rows), **rest),
    "indexer_cache_write": lambda k, **rest: ops.indexer_cache_write(k * _by_the_number_of(k), **rest),
    "w4a8_prepack": lambda packed, scale, **rest: ops.w4a8_prepack(packed, scale * _by_the_number_of(scale), **rest),
    "w4a8_unpack": lambda w: tuple(t * _by_the_number_of(w) for t in as_tuple(ops.w4a8_unpack(w))),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_rows_are_found_where_outputs_are_blocks_pools_and_layouts(name):
    report = check(name, impl=UNEVEN[name], examples=4, properties=["row_invariance"])
    assert report.failed == ["row_invariance"] and "raised" not in str(report)


def test_a_choice_among_pages_is_held_to_its_ties():
    def higher_index(topk, **arguments):
        scores = paged_logits(**arguments).float()
        return higher_of_ties(scores, topk), ops.lightning_indexer_topk_paged(**arguments, topk=topk)[1]

    kit = {"name": "lightning_indexer_topk_paged", "impl": higher_index, "examples": 8}
    assert check(**kit, properties=["accuracy", "ties"]).failed == ["ties"]


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
