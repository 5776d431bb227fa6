"""Each fixed pattern pair by pair against its formula, drawn blocks and tokens against their rules, and how far sweeps reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.executors.local_sparse_global.attention import LSGAttention
from sparsefinder.graphs import QK
from sparsefinder.patterns.bigbird import BigBird
from sparsefinder.patterns.block_local import BlockLocal
from sparsefinder.patterns.combine import Causal, Union, layout_of
from sparsefinder.patterns.dilated import Dilated
from sparsefinder.patterns.longformer import Longformer
from sparsefinder.patterns.lsg import LSG
from sparsefinder.patterns.openai_fixed import OpenAIFixed
from sparsefinder.patterns.openai_strided import OpenAIStrided
from sparsefinder.patterns.sinks import Sinks
from sparsefinder.patterns.window import GlobalTokens, Window
from sparsefinder.testing import Subject, check_pattern
from tests.conftest import random_qk
from tests.patterns.test_patterns import FILES, settings

Formula = Callable[[int, int, int, int], bool]  # (query, key, head, tokens) → edge

FORMULAS: dict[str, tuple[Any, Formula]] = {
    "block_local": (BlockLocal(4), lambda i, j, h, n: i // 4 == j // 4),
    "openai_fixed": (OpenAIFixed(5, 2), lambda i, j, h, n: i // 5 == j // 5 or j % 5 in (3, 4)),
    "openai_fixed without columns": (OpenAIFixed(5, 0), lambda i, j, h, n: i // 5 == j // 5),
    "openai_strided": (OpenAIStrided(5, 5), lambda i, j, h, n: abs(i - j) <= 5 or (i - j) % 5 == 0),
    "openai_strided, near of its own": (OpenAIStrided(6, 2), lambda i, j, h, n: abs(i - j) < 2 or (i - j) % 6 == 0),
    "dilated": (Dilated(5, 3), lambda i, j, h, n: abs(i - j) in (0, 3, 6)),
    "dilated beyond the text": (Dilated(99, 4), lambda i, j, h, n: (i - j) % 4 == 0),
    "dilated without gaps": (Dilated(5, 1), lambda i, j, h, n: abs(i - j) <= 2),
    "sinks": (Sinks(3, 2), lambda i, j, h, n: j < 2 or abs(i - j) <= 1),
    "no sinks": (Sinks(3, 0), lambda i, j, h, n: abs(i - j) <= 1),
    "longformer": (Longformer(5, num_global_tokens=2), lambda i, j, h, n: abs(i - j) <= 2 or min(i, j) < 2),
    "longformer, dilated": (
        Longformer(5, dilation=2, dilated_heads=1),
        lambda i, j, h, n: min(i, j) < 1 or abs(i - j) in ((0, 2, 4) if h == 0 else (0, 1, 2)),
    ),
    "bigbird without chance": (
        BigBird(3, 3, 0, 1),
        lambda i, j, h, n: abs(i // 3 - j // 3) <= 1 or min(i, j) < 3 or max(i, j) // 3 == (n - 1) // 3,
    ),
    "bigbird, a wide window": (BigBird(2, 5, 0, 0), lambda i, j, h, n: abs(i // 2 - j // 2) <= 2),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_pair_by_pair(name: str, causal: bool) -> None:
    pattern, formula = FORMULAS[name]
    qk = random_qk([23, 14, 2], heads=2, causal=causal)
    graph = pattern(qk, 0)
    for b, n in enumerate([23, 14, 2]):
        for h in range(2):
            for i in range(n):
                for j in range(n):
                    expected = formula(i, j, h, n) and (j <= i or not causal)
                    assert graph[b, h, i, j] == expected, (b, h, i, j)


def test_the_strided_pattern_is_the_union_of_the_papers_two_heads() -> None:
    """Child et al. give ``A(1) = {max(0, i − l), …, i}``, one key more than a stride; that key is in ``A(2)`` anyway."""
    graph = OpenAIStrided(4, 4)(random_qk([21], causal=True), 0)[0, 0]
    for i in range(21):
        first = set(range(max(0, i - 4), i + 1))
        second = {j for j in range(i + 1) if (i - j) % 4 == 0}
        assert set(graph[i].nonzero().flatten().tolist()) == first | second


def test_holes_between_real_tokens_do_not_count() -> None:
    """Blocks, strides, sinks and dilation are counted over real tokens (a window is not: it is a band of the matrix)."""
    valid = torch.tensor([[False, True, False, True, True, False, True, True, True, True]])
    places = torch.arange(10)[valid[0]]
    holes = random_qk([10])
    holes = QK(holes.q, holes.k, valid)
    packed = QK(holes.q[:, :, places], holes.k[:, :, places], valid[:, places])
    for pattern in (
        BlockLocal(3),
        OpenAIFixed(3, 1),
        OpenAIStrided(3, 1),
        Dilated(3, 2),
        Sinks(1, 2),
        BigBird(1),
        LSG(block=2),
    ):
        graph = pattern(holes, 0)
        assert torch.equal(graph[:, :, places][..., places], pattern(packed, 0)), pattern
        assert not graph[:, :, ~valid[0]].any()


class TestDrawnBlocks:
    def seen(self, pattern: BigBird, tokens: int, layer: int = 0) -> Tensor:
        """Blocks that each block sees, ``(H, blocks, blocks)``, from a graph in which they are whole."""
        graph = pattern(random_qk([tokens], heads=3), layer)[0]
        blocks = graph[:, :: pattern.block, :: pattern.block]
        whole = blocks.repeat_interleave(pattern.block, 1).repeat_interleave(pattern.block, 2)
        assert torch.equal(graph, whole[:, :tokens, :tokens])
        return blocks

    @pytest.mark.parametrize("drawn", [1, 2, 5])
    def test_as_many_as_asked_for_and_none_that_is_seen_anyway(self, drawn: int) -> None:
        with_chance = self.seen(BigBird(2, 3, drawn, 1), 39)  # 20 blocks, the last one of a single token
        without = self.seen(BigBird(2, 3, 0, 1), 39)
        assert (with_chance[:, 1:-1].sum(-1) == without[:, 1:-1].sum(-1) + drawn).all()
        assert (with_chance | ~without).all()

    def test_all_blocks_where_few_are_left(self) -> None:
        assert self.seen(BigBird(2, 3, 99, 1), 39).all()
        assert self.seen(BigBird(4, 1, 3, 0), 12).all()

    def test_uniformly(self) -> None:
        """Each eligible block equally often: 1,200 draws of 2 of the blocks that are left, by block of the query."""
        counts = torch.zeros(12, 12)
        for layer in range(400):
            counts += self.seen(BigBird(1, 3, 2, 1), 12, layer).sum(0)
        for block in range(2, 10):
            eligible = [j for j in range(1, 11) if abs(j - block) > 1]
            expected = 1200 * 2 / len(eligible)
            assert (counts[block, eligible] - expected).abs().max() < 5 * expected**0.5

    def test_heads_and_layers_differ(self) -> None:
        first, second = self.seen(BigBird(2), 60, 0), self.seen(BigBird(2), 60, 1)
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first, second)


class TestRandomGlobals:
    PATTERN = Longformer(1, num_global_tokens=3, placement="random")

    def test_they_see_all_and_are_seen_by_all(self) -> None:
        graph = self.PATTERN(random_qk([30, 21], heads=3), 2)
        for b, n in enumerate([30, 21]):
            for h in range(3):
                real = graph[b, h, :n, :n]
                is_global = real.all(-1)
                assert is_global.sum() == 3
                assert torch.equal(real, is_global[:, None] | is_global | torch.eye(n, dtype=torch.bool))

    def test_conformance(self) -> None:
        check_pattern(self.PATTERN, sweep=[1, 5, 15], dense=replace(self.PATTERN, width=99), heads=3)

    def test_more_than_there_are_tokens(self) -> None:
        qk = random_qk([2, 9])
        graph = replace(self.PATTERN, num_global_tokens=5)(qk, 0)
        assert graph[0, :, :2, :2].all()
        assert not (graph & ~qk.allowed).any()


class TestLSG:
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("kind", ["norm", "stride", "block_stride", "none"])
    @pytest.mark.parametrize("block", [2, 4, 8])
    def test_is_the_graph_of_the_attention(self, block: int, kind: str, causal: bool) -> None:
        for factor, front in ((1, 1), (2, 0), (2, 3)):
            attention = LSGAttention(kind, block, block, factor, front, causal=causal)
            for left in (False, True):
                qk = Subject(None, heads=3).sentences([37, 20, 3, 0], causal, left=left)
                expected = attention.graph(qk)
                assert expected is not None
                assert torch.equal(LSG(kind, block, factor, front)(qk, 0), expected)

    @pytest.mark.parametrize("kind", ["stride", "block_stride", "none"])
    def test_conformance_of_the_other_types(self, kind: str) -> None:
        pattern = LSG(kind, 4)
        check_pattern(pattern, sweep=[2, 4, 8, 16], dense=replace(pattern, block=64), heads=3)

    @pytest.mark.parametrize("kind", ["pooling", "lsh", "bos_pooling"])
    def test_pooled_keys_have_no_graph(self, kind: str) -> None:
        with pytest.raises(UserError, match=f"attention=lsg_{kind}"):
            LSG(kind)


class TestCausal:
    def test_only_the_past(self) -> None:
        qk = random_qk([9, 6])
        for pattern in (Window(5), GlobalTokens(2), BigBird(2), Longformer(3, placement="random"), LSG("norm", 2)):
            past = Causal(pattern)(qk, 1)
            assert torch.equal(past, pattern(replace(qk, causal=True), 1))
            assert not past.triu(1).any()
            assert past.any()

    def test_in_a_union_it_looks_back_alone(self) -> None:
        graph = Union((Causal(Window(5)), Window(1)))(random_qk([7]), 0)[0, 0]
        assert torch.equal(graph, torch.ones(7, 7, dtype=torch.bool).tril().triu(-2))

    def test_a_causal_model_runs_its_layout(self) -> None:
        qk = random_qk([9, 6], causal=True)
        assert torch.equal(layout_of(Causal(Sinks(3)), qk, 0).graph(qk), Sinks(3)(qk, 0))
        check_pattern(Window(3), build=Causal, sweep=[1, 3, 5])

    def test_a_layout_cannot_say_which_side(self) -> None:
        with pytest.raises(UserError, match="attention=masked"):
            layout_of(Causal(Window(3)), random_qk([5]), 0)


BY_NAME = {path.stem: path for path in FILES}
# patterns whose least graph is larger than the others', and why
LEAST = {
    "openai_fixed": 0.07,  # blocks of 8
    "openai_strided": 0.05,  # every 32nd key
    "bigbird": 0.09,  # ten blocks of one token
    "lsg": 0.11,  # three blocks of 2, sparse keys, a global token
}
FIXED = ("window", "dilated", "longformer", "bigbird", "openai_fixed", "openai_strided", "block_local", "sinks", "lsg")
BUDGETS = ("random", "oracle_topk", "oracle_head")


@pytest.mark.parametrize("tokens", [128, 256])
@pytest.mark.parametrize("name", [*FIXED, *BUDGETS])
def test_sweeps_reach_from_few_pairs_to_half_of_them(name: str, tokens: int) -> None:
    pattern, sweep = settings(BY_NAME[name])
    qk = random_qk([tokens], heads=2)
    ends = [
        replace(pattern, **{pattern.sparsity_parameter: value})(qk, 0).float().mean() for value in (sweep[0], sweep[-1])
    ]
    assert ends[0] < LEAST.get(name, 0.04)
    assert ends[1] >= 0.5 * (1 - 1 / tokens)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockLocal(0), "block must be 1 or more, got 0"),
        (lambda: OpenAIFixed(4, 5), "columns must lie between 0 and block=4, got 5"),
        (lambda: OpenAIStrided(0), "stride must be 1 or more"),
        (lambda: Dilated(4), "width must be an odd number, 1 or more, got 4: try 5"),
        (lambda: Dilated(3, 0), "dilation must be 1 or more"),
        (lambda: Sinks(3, -1), "sinks must be 0 or more"),
        (lambda: Longformer(placement="last"), "placement=last is unknown; choose one of first, random"),
        (lambda: Longformer(num_global_tokens=-1), "num_global_tokens must be 0 or more"),
        (lambda: BigBird(window_blocks=2), "window_blocks must be an odd number"),
        (lambda: BigBird(random_blocks=-1), "random_blocks must be 0 or more"),
        (lambda: LSG("norms"), "norm, pooling, lsh"),
        (lambda: LSG(block=3), "not divisible"),
    ],
)
def test_wrong_settings(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
