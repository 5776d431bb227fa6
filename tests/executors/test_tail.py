"""The tail of a layout: every way to multiply it beside a plain loop, and the limits in which it is something known."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.errors import UserError
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.normalizers import Normalizer
from tests.executors.tails import Tailed, plain
from tests.test_attention import assert_same, positions, right_padded, routed, vectors, with_gradients

ALPHAS = [1.0, 1.25, 1.5, 2.0]
TOKENS = 18
GLOBALS = positions(TOKENS, [0, 17], [0, 8])
PATTERNS = {
    "clusters": Tailed(routed(2, 2, TOKENS, 2, 7)),
    "window": Tailed(routed(2, 2, TOKENS, 2, 7), 5),
    "window and globals": Tailed(routed(2, 2, TOKENS, 1, 4), 3, GLOBALS),
    "window beyond the text": Tailed(routed(2, 2, TOKENS, 2, 7), 99),
    "tail alone": Tailed(Buckets(torch.full((2, 2, TOKENS, 1), -1), routed(2, 2, TOKENS, 1, 5).k_ids, 5)),
    "no slot": Tailed(Buckets(torch.zeros(2, 2, TOKENS, 0, dtype=torch.int64), routed(2, 2, TOKENS, 1, 5).k_ids, 5)),
}
EXECUTORS = {"masked": Masked, "blocks": partial(Bucketed, executor="blocks")} | {
    "a few at a time": partial(Bucketed, executor="blocks", queries_at_once=60),
    "auto": Bucketed,
}
EACH = pytest.mark.parametrize("attention", EXECUTORS.values(), ids=EXECUTORS)


INPUTS = vectors(2, 2, TOKENS, 4, dtype=torch.float64)
# padded on the right, and with holes
VALID = right_padded([18, 12], TOKENS) & (torch.arange(TOKENS) % 7 != 3)


@cache
def expected(name: str, alpha: float, causal: bool) -> list[Tensor]:
    """Output and gradients of the plain loop, in float64."""

    def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        qk = QK(q, k, valid, causal)
        return plain(PATTERNS[name].layout(qk, layer), qk, v, alpha)

    return with_gradients(attention, INPUTS, VALID)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
@EACH
def test_it_is_the_plain_loop(attention: Any, name: str, causal: bool) -> None:
    """Output and gradients, in float64 and float32."""
    for alpha in ALPHAS:
        run, right = attention(PATTERNS[name], Normalizer(alpha), causal), expected(name, alpha, causal)
        assert_same(with_gradients(run, INPUTS, VALID), right, 1e-8)
        single = [x.float() for x in INPUTS]
        assert_same(with_gradients(run, single, VALID), [x.float() for x in right], 2e-4)


def test_keys_in_several_buckets_have_no_tail() -> None:
    ids = torch.zeros(1, 1, 3, 2, dtype=torch.int64)
    for make in (lambda: Layout(Buckets(ids, ids, 1), tail=True), lambda: Layout(window=3, tail=True)):
        with pytest.raises(
            UserError, match=r"a tail needs every key in one bucket, here it may be in [02]: .* tail=false$"
        ):
            make()
    one = Layout(Buckets(ids, ids[..., :1], 1), tail=True)
    assert one.union(Layout(window=3)).tail
    with pytest.raises(UserError, match="a tail needs every key in one bucket, here it may be in 3"):
        one.union(Layout(Buckets(ids, ids, 1)))
