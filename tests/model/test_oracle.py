"""The model against a second, independent implementation of its published description."""

import pytest
import torch

from tests.model import shapes
from tests.model.oracle import Oracle


@pytest.mark.parametrize("form", shapes.FORMS)
@torch.no_grad()
def test_logits_are_those_of_the_description(form):
    # Rope, no-rope and value widths differ, so that taking one for the other shows.
    model = shapes.model(form, index_head_dim=40, qk_nope_head_dim=24, qk_rope_head_dim=16, v_head_dim=20, index_n_heads=4)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if "norm" in name or "bias" in name:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    ids = shapes.random_tokens(60)
    got = model(ids[None], mtp_depth=3)
    want = Oracle(model.config, model.state_dict(), form == "sparse").logits(ids, mtp_depth=3)
    for ours, theirs in zip((got.logits, *got.mtp_logits), want, strict=True):
        ours = ours[0, : len(theirs)].double()
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
