"""token_logprobs: against float64, and bit for bit against the log-softmax of linear's logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glm5 import ops
from glm5.testing import RandomDraw, relative_error, spec
from tests.ops import properties
from tests.ops.properties import same_bits

OP = spec("token_logprobs")
DTYPES = pytest.mark.parametrize("dtype", OP.dtypes, ids=["bf16", "float32"])


def example(tokens, dim, vocab, dtype, seed=0):
    draw = RandomDraw(seed)
    return {
        "hidden": draw.tensor(tokens, dim, dtype=dtype),
        "lm_head": draw.tensor(vocab, dim, dtype=dtype, scale=0.1),
        "targets": torch.randint(0, vocab, (tokens,), generator=torch.Generator().manual_seed(seed)),
        "temperature": 0.3 + torch.rand(tokens, generator=torch.Generator().manual_seed(seed)),
    }


@DTYPES
def test_keeps_its_promise(isa, dtype):
    settings(max_examples=12)(given(st.data())(lambda data: properties.assert_keeps_promise(OP, data, dtype)))()


@DTYPES
def test_thread_count_does_not_matter(isa, dtype):
    settings(max_examples=6)(
        given(st.data())(lambda data: properties.assert_thread_count_does_not_matter(OP, data, dtype))
    )()


@DTYPES
def test_is_the_log_softmax_of_linears_logits(isa, dtype):
    """Feeding linear's float32 logits back through an identity head gives the same bits: the logits were linear's."""
    arguments = example(9, 70, 600, dtype)
    logits = ops.linear(arguments["hidden"], arguments["lm_head"], out_dtype=torch.float32)
    direct = ops.token_logprobs(**arguments)
    through_logits = ops.token_logprobs(
        hidden=logits, lm_head=torch.eye(600), targets=arguments["targets"], temperature=arguments["temperature"]
    )
    assert all(same_bits(a, b) for a, b in zip(direct, through_logits, strict=True))
    z = logits.double() / arguments["temperature"].double()[:, None]
    want = torch.log_softmax(z, -1).gather(1, arguments["targets"][:, None]).squeeze(1)
    assert relative_error(direct[0], want) < 1e-6


@DTYPES
def test_a_row_depends_on_itself_alone(isa, dtype):
    arguments = example(500, 40, 530, dtype)
    whole = ops.token_logprobs(**arguments)

    def rows(index):
        part = {k: v if k == "lm_head" else v[index] for k, v in arguments.items()}
        return zip(ops.token_logprobs(**part), whole, strict=True)

    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert all(same_bits(part, all_rows[order]) for part, all_rows in rows(order))
    for start, end in ((0, 1), (239, 240), (240, 241), (100, 390), (499, 500)):
        assert all(same_bits(part, all_rows[start:end]) for part, all_rows in rows(slice(start, end)))


@DTYPES
def test_more_tokens_and_columns_than_a_chunk(dtype):
    """Backward over several chunks of tokens (960) and of vocabulary (2048)."""
    arguments = example(1100, 24, 2300, dtype)
    assert not (found := properties.complaints(OP, ops.token_logprobs, arguments, dtype)), found


def test_tokens_of_the_next_chunk_are_as_those_of_the_first(isa):
    """The forward keeps results of 1920 tokens at a time."""
    arguments = example(1925, 8, 300, torch.bfloat16)
    whole = ops.token_logprobs(**arguments)
    for rows in (slice(1918, 1925), slice(1920, 1921), slice(0, 1920)):
        part = ops.token_logprobs(**{k: v if k == "lm_head" else v[rows] for k, v in arguments.items()})
        assert all(same_bits(w[rows], p) for w, p in zip(whole, part, strict=True))


def test_far_logits(isa):
    """-inf logits have probability 0 and leave the entropy finite; a NaN poisons its own row alone."""
    head = torch.eye(300)
    logits = torch.randn(4, 300)
    logits[0, 1:] = -1e30  # one column has all the mass
    logits[1, :280] = -200.0
    logits[2, 7] = float("nan")
    logp, entropy = ops.token_logprobs(logits, head, torch.zeros(4, dtype=torch.long), torch.ones(4))
    assert logp[0] == 0 and entropy[0] == 0
    assert relative_error(logp[1], torch.log_softmax(logits[1].double(), -1)[0]) < 1e-6
    assert logp[2].isnan() and entropy[2].isnan()
    assert logp[3].isfinite() and entropy[3].isfinite()


def test_each_gradient_alone():
    arguments = example(6, 8, 20, torch.float32)
    both = torch.autograd.grad(sum(o.sum() for o in ops.token_logprobs(**_leaves(arguments, "hidden", "lm_head"))), _last[0])
    for i, name in enumerate(("hidden", "lm_head")):
        outputs = ops.token_logprobs(**_leaves(arguments, name))
        assert same_bits(torch.autograd.grad(sum(o.sum() for o in outputs), _last[0])[0], both[i])


_last = [None]


def _leaves(arguments, *names):
    leaves = {k: v.clone().requires_grad_(k in names) if k in names else v for k, v in arguments.items()}
    _last[0] = [leaves[k] for k in names]
    return leaves


def test_gradcheck():
    for seed in range(2):
        arguments = example(3, 4, 5 + 260 * seed, torch.float64, seed)
        leaves = [arguments[k].requires_grad_() for k in ("hidden", "lm_head")]
        assert torch.autograd.gradcheck(
            lambda h, w, a=arguments: ops.token_logprobs(h, w, a["targets"], a["temperature"]), leaves
        )


def test_autocast_leaves_the_temperature_alone():
    arguments = example(3, 8, 9, torch.float32)
    arguments["temperature"] = torch.full((3,), 1.2345678)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.token_logprobs(**arguments)
    arguments |= {"hidden": arguments["hidden"].bfloat16(), "lm_head": arguments["lm_head"].bfloat16()}
    assert all(same_bits(a, b) for a, b in zip(got, ops.token_logprobs(**arguments), strict=True))


def test_opcheck_compile_export():
    arguments, other = example(6, 16, 30, torch.float32), example(11, 16, 30, torch.float32)
    leaves = tuple(v.clone().requires_grad_(k in ("hidden", "lm_head")) for k, v in arguments.items())
    properties.assert_opcheck(OP, leaves)
    properties.assert_compiles(OP, arguments, other)
    tokens = torch.export.Dim("tokens")
    properties.assert_exports(OP, arguments, {k: {0: tokens} for k in ("hidden", "targets", "temperature")})


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"targets": torch.tensor([0, 9])}, ValueError, r"targets\[1\] is 9, want a number in \[0, 9\)"),
        ({"targets": torch.tensor([0, -1])}, ValueError, r"targets\[1\] is -1"),
        ({"targets": torch.tensor([0, 1], dtype=torch.int32)}, ValueError, "targets has dtype Int"),
        ({"temperature": torch.tensor([1.0, 0.0])}, ValueError, r"temperature\[1\] is 0"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature has shape"),
        ({"lm_head": torch.ones(9, 5)}, ValueError, "lm_head has shape"),
        ({"lm_head": torch.ones(0, 8)}, ValueError, "at least one row"),
        ({"hidden": torch.ones(2, 8, dtype=torch.int32)}, ValueError, "hidden has dtype"),
        ({"hidden": None}, TypeError, "hidden is NoneType"),
    ],
)
def test_bad_input(change, error, words):
    properties.assert_refused(error, words, ops.token_logprobs, **{**example(2, 8, 9, torch.float32), **change})
