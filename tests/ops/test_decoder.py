"""The calls of a decode step, whose bits tests/model/test_invariance.py compares with those of the public ops."""

import pytest
import torch

from glm5.ops import _decoder

HEADS, NOPE, ROPE, KV, RANK, HIDDEN, VALUE = 3, 8, 4, 12, 10, 14, 6


def inputs(tokens=5, dtype=torch.float32, indexed=True):
    def weight(*shape):
        return torch.randn(shape).to(dtype)

    index = [weight(2 * 8, RANK), weight(8, HIDDEN), weight(8), weight(8), weight(2, HIDDEN)]
    return {
        "x": weight(tokens, HIDDEN),
        "q_a": weight(RANK, HIDDEN),
        "q_a_bias": weight(RANK),
        "q_norm": weight(RANK),
        "q_b": weight(HEADS * (NOPE + ROPE), RANK),
        "kv_a": weight(KV + ROPE, HIDDEN),
        "kv_a_bias": None,
        "kv_norm": weight(KV),
        "kv_b": weight(HEADS * (NOPE + VALUE), KV),
        "heads": HEADS,
        "nope": NOPE,
        "eps": 1e-6,
        "cos": torch.randn(20, ROPE // 2),
        "sin": torch.randn(20, ROPE // 2),
        "positions": torch.arange(tokens, dtype=torch.int32),
        **dict(
            zip(
                ("index_q", "index_k", "index_norm", "index_norm_bias", "index_weights"),
                index if indexed else [None] * 5,
                strict=True,
            )
        ),
        "index_scale": 0.5,
    }


def output(tokens=5, dtype=torch.float32):
    shapes = {"attended": (tokens, HEADS, KV), "kv_b": (HEADS * (NOPE + VALUE), KV), "o": (HIDDEN, HEADS * VALUE)}
    drawn = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    return {"attended": drawn["attended"], "kv_b": drawn["kv_b"], "nope": NOPE, "o": drawn["o"], "o_bias": None}


def mlp(tokens=5, dtype=torch.float32):
    shapes = {"x": (tokens, HIDDEN), "gate": (9, HIDDEN), "up": (9, HIDDEN), "down": (HIDDEN, 9)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_opcheck(dtype, tokens):
    for name, arguments in (
        ("decoder_inputs", inputs(tokens, dtype)),
        ("decoder_inputs", inputs(tokens, dtype, indexed=False)),
        ("decoder_output", output(tokens, dtype)),
        ("decoder_mlp", mlp(tokens, dtype)),
    ):
        torch.library.opcheck(getattr(torch.ops.glm5, name).default, tuple(arguments.values()))


def test_weights_may_be_strided():
    whole, strided = mlp(), mlp()
    for name in ("x", "gate", "up", "down"):
        whole[name] = strided[name] = torch.randn(whole[name].shape).T.contiguous().T
        whole[name] = whole[name].contiguous()
    assert torch.equal(_decoder.decoder_mlp(*whole.values()), _decoder.decoder_mlp(*strided.values()))


@pytest.mark.parametrize(
    ("make", "name", "value", "words"),
    [
        (inputs, "x", torch.zeros(5, 14, dtype=torch.float64), "x has dtype Double, want BFloat16 or Float"),
        (inputs, "q_a", torch.zeros(10, 13), "q_a has shape .10, 13., want size 14 in dimension 1"),
        (inputs, "q_b", torch.zeros(36, 10, dtype=torch.bfloat16), "q_b has dtype BFloat16, want Float"),
        (inputs, "kv_b", torch.zeros(43, 12), "kv_b has shape .43, 12., want at least 8 rows for each of 3 heads"),
        (inputs, "heads", 0, "heads is 0"),
        (inputs, "positions", torch.full((5,), 20, dtype=torch.int32), "positions.0. is 20, want 0 <= position < 20"),
        (inputs, "sin", torch.zeros(19, 2), "sin has shape .19, 2., want size 20"),
        (inputs, "index_k", None, "index_q comes without one of the indexer's other weights"),
        (inputs, "index_norm", torch.zeros(2), "index_norm_bias has shape .8., want size 2"),
        (output, "kv_b", torch.zeros(42, 11), "kv_b has shape .42, 11., want size 12"),
        (output, "nope", 15, "kv_b has shape .42, 12., want at least 15 rows"),
        (output, "o", torch.zeros(14, 17), "o has shape .14, 17., want size 18"),
        (mlp, "up", torch.zeros(8, 14), "up has shape .8, 14., want size 9"),
        (mlp, "down", torch.zeros(14), "down has shape .14., want 2 dimensions"),
    ],
)
def test_bad_input(make, name, value, words):
    op = {inputs: "decoder_inputs", output: "decoder_output", mlp: "decoder_mlp"}[make]
    with pytest.raises(ValueError, match=f"{op}: {words}"):
        getattr(_decoder, op)(*{**make(), name: value}.values())
