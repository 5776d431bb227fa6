"""Projections: the published files, their shapes, and clear errors for files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparsefinder.errors import UserError
from sparsefinder.predictors.projections import (
    Hidden,
    Identity,
    LayerProjections,
    Linear,
    Projection,
    Projections,
    load_projections,
)
from tests.conftest import random_qk


def test_reads_the_published_form(graph_files: Path) -> None:
    raw = torch.load(graph_files / "golden_projections_indep.pickle", weights_only=True)
    projections = load_projections(graph_files / "golden_projections_indep.pickle")
    qk = random_qk([5], heads=3, size=16)
    for layer in range(2):
        projected = projections(qk, layer)
        for side in ("q", "k"):
            expected = torch.einsum("bhnd,hdr->bhnr", getattr(qk, side), raw[layer][side]["w"]) + raw[layer][side]["b"]
            torch.testing.assert_close(getattr(projected, side), expected)


@pytest.mark.parametrize("kind", ["linear", "hidden", "concat", "none"])
def test_writes_what_it_reads(kind: str, tmp_path: Path) -> None:
    made = {
        "linear": LayerProjections(Linear(2, 8, 3), Linear(2, 8, 3)),
        "hidden": LayerProjections(Hidden(2, 8, 5, 3), Hidden(2, 8, 5, 3)),
        "concat": LayerProjections(both := Linear(2, 16, 3), both),
        "none": LayerProjections(Identity(), Identity()),
    }[kind]
    Projections([made]).save(tmp_path / "p.pickle")
    qk = random_qk([4, 6])
    before, after = made(qk), load_projections(tmp_path / "p.pickle")(qk, 0)
    assert torch.equal(before.q, after.q)
    assert torch.equal(before.k, after.k)
    if kind == "concat":
        assert torch.equal(after.q, after.k)


@pytest.mark.parametrize("projection", [Linear(2, 8, 3), Linear(2, 8, 12), Hidden(2, 8, 5, 3), Identity()])
def test_padding_is_projected_to_zero(projection: Projection) -> None:
    qk = random_qk([2, 6])
    before = qk.q.clone()
    projected = LayerProjections(projection, projection)(qk)
    assert (projected.q[0, :, 2:] == 0).all()
    assert torch.equal(qk.q, before), "in a copy"


@pytest.mark.parametrize("size", [1, 3, 8, 9, 12])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_linear_by_hand(size: int, tokens: int) -> None:
    """Few columns are multiplied in another order; gradients reach weights and biases either way."""
    layer, x = Linear(2, 8, size), torch.randn(3, 2, tokens, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.b.add_(1.0)
    found, plain = layer(x), torch.einsum("bhnd,hdr->bhnr", x, layer.w) + layer.b
    assert found.is_contiguous()
    torch.testing.assert_close(found, plain)
    both = [torch.autograd.grad(y.square().sum(), (layer.w, layer.b)) for y in (found, plain)]
    for ours, expected in zip(*both, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


LINEAR = {"w": torch.zeros(2, 8, 3), "b": torch.zeros(2, 1, 3)}
WRONG = {
    "no list": ({"q": LINEAR}, "a list over layers"),
    "empty": ([], "a list over layers"),
    "no k": ([{"q": LINEAR}], "'q' and 'k'"),
    "unknown names": ([{"q": {"weight": torch.zeros(2)}, "k": LINEAR}], "known are w, b"),
    "bad bias": ([{"q": LINEAR | {"b": torch.zeros(2, 3)}, "k": LINEAR}], "do not fit together"),
    "other sizes": ([{"q": LINEAR, "k": {"w": torch.zeros(2, 8, 4), "b": torch.zeros(2, 1, 4)}}], "but k by"),
    "nan": ([{"q": LINEAR | {"b": torch.full((2, 1, 3), torch.nan)}, "k": LINEAR}], "NaN"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_one_clear_line(case: str, tmp_path: Path) -> None:
    value, message = WRONG[case]
    torch.save(value, tmp_path / "wrong.pickle")
    with pytest.raises(UserError, match=message) as error:
        load_projections(tmp_path / "wrong.pickle")
    assert "\n" not in str(error.value)


def test_another_model_is_refused(graph_files: Path) -> None:
    projections = load_projections(graph_files / "golden_projections.pickle")
    with pytest.raises(UserError, match="3 heads of size 16"):
        projections(random_qk([4], heads=2, size=16), 0)
    with pytest.raises(UserError, match="2 layers"):
        projections(random_qk([4], heads=3, size=16), 2)
    with pytest.raises(UserError, match="have 5"):
        projections.check(5, 3, 16)
    projections.check(2, 3, 16)
