"""`Auto`: dense below the length from which a prediction pays, sparse above it, and that length kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sparsefinder.attention import Bucketed, Dense
from sparsefinder.auto_attention import Auto
from sparsefinder.errors import UserError
from sparsefinder.evaluation.cost import Stopwatch
from sparsefinder.executors import fastest_by_length
from sparsefinder.executors.fastest_by_length import Bracket
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.window import Window
from sparsefinder.predictors.centroids import Centroids

NORMALIZERS = pytest.mark.parametrize("normalizer", [Normalizer(1.0), Normalizer(1.5)], ids=["softmax", "entmax"])


def vectors(batch: int, tokens: int, lengths: list[int] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 2, tokens, 8, generator=generator) for _ in range(3))
    valid = torch.arange(tokens) < torch.tensor(lengths or [tokens] * batch)[:, None]
    return q, k, v, valid


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(fastest_by_length.FILE, str(tmp_path / "kept" / "crossovers.json"))
    return tmp_path / "kept" / "crossovers.json"


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths that were raced; the sparse way wins from 384 tokens on."""
    raced: list[int] = []

    def timed(device: torch.device, dense: Callable[[], Tensor], sparse: Callable[[], Tensor]) -> tuple[float, float]:
        raced.append(sparse().shape[2])
        assert dense().shape == sparse().shape
        return float(raced[-1]), 0.5 * raced[-1] + 160.0

    monkeypatch.setattr(fastest_by_length, "timed", timed)
    return raced


@NORMALIZERS
def test_each_text_is_attended_by_its_own_length(normalizer: Normalizer) -> None:
    q, k, v, valid = vectors(3, 40, [40, 12, 24])
    v[1, :, 12:] = math.nan  # what padding holds never matters
    auto = Auto(Window(5), normalizer, crossover=20)
    out = auto(q, k, v, valid, 0)
    sparse, dense = Bucketed(Window(5), normalizer), Dense(normalizer)
    for row, length, attention in ((0, 40, sparse), (1, 12, dense), (2, 24, sparse)):
        one = [x[row : row + 1, :, :length] for x in (q, k, v)]
        alone = attention(*one, torch.ones(1, length, dtype=torch.bool), 0)
        torch.testing.assert_close(out[row : row + 1, :, :length], alone)
    assert not out[1, :, 12:].any()
    assert not out[2, :, 24:].any()


@NORMALIZERS
def test_what_is_measured_is_what_is_run(normalizer: Normalizer) -> None:
    q, k, _, valid = vectors(2, 40, [40, 12])
    auto = Auto(Window(5), normalizer, crossover=20)
    qk = QK(q, k, valid)
    expected = torch.stack([Bucketed(Window(5)).graph(qk, 0)[0], Dense().graph(qk, 0)[1]])
    assert torch.equal(auto.graph(qk, 0), expected)
    assert torch.equal(auto.computed_pairs(qk, 0), expected.sum((-2, -1)))


@NORMALIZERS
def test_gradients_of_short_and_long_texts_in_one_batch(normalizer: Normalizer) -> None:
    q, k, v, valid = vectors(2, 40, [40, 12])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    weights = torch.randn(v.shape, generator=torch.Generator().manual_seed(1))
    mixed = torch.autograd.grad((Auto(Window(5), normalizer, crossover=20)(*inputs, valid, 0) * weights).sum(), inputs)
    for row, attention in enumerate((Bucketed(Window(5), normalizer), Dense(normalizer))):
        alone = torch.autograd.grad((attention(*inputs, valid, 0) * weights)[row].sum(), inputs)
        for ours, expected in zip(mixed, alone, strict=True):
            torch.testing.assert_close(ours[row], expected[row])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", [False, True])
def test_softmax_of_padded_texts_needs_no_mask(causal: bool, left: bool) -> None:
    q, k, v, valid = vectors(3, 20, [20, 7, 1])
    valid = valid.flip(-1) if left else valid
    q, k, v = (x.masked_fill(~valid[:, None, :, None], math.nan) for x in (q, k, v))
    out = Dense(Normalizer(1.0), causal)(q, k, v, valid)
    for row in range(3):
        one = [x[row : row + 1, :, valid[row]] for x in (q, k, v)]
        alone = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=causal)
        torch.testing.assert_close(out[row : row + 1, :, valid[row]], alone)
        assert not out[row, :, ~valid[row]].any()


def test_a_length_is_raced_once_and_kept(file: Path, races: list[int]) -> None:
    def dense_at(tokens: int) -> bool:
        q, k, v, valid = vectors(1, tokens)
        out = Auto(Window(5))(q, k, v, valid, 0)
        return torch.equal(out, Dense()(q, k, v, valid))

    assert dense_at(127)
    assert not races
    assert not dense_at(1500)
    assert races == [1024]
    assert not dense_at(2000)
    assert not dense_at(1024)
    assert races == [1024]
    assert dense_at(300)
    assert races == [1024, 256]
    assert not dense_at(400)
    assert races == [1024, 256, 384]
    fastest_by_length._known.clear()  # another process
    assert dense_at(383)
    assert not dense_at(384)
    assert races == [1024, 256, 384]
    assert list(json.loads(file.read_text()).values()) == [[256, 384]]


def test_what_is_settled_as_softmax_needs_no_question(file: Path, races: list[int]) -> None:
    def settled(attention: Auto, tokens: int, layer: int = 0) -> bool:
        q, k, _, _ = vectors(1, tokens)
        return attention.is_softmax(q, k, layer)

    auto = Auto(Window(5), Normalizer(1.0))
    assert settled(auto, 127)
    assert not settled(auto, 300)  # not known yet
    auto(*vectors(1, 300), 0)
    assert settled(auto, 300)
    assert not settled(auto, 300, layer=1)
    assert not settled(auto, 500)
    auto(*vectors(1, 500), 0)
    assert not settled(auto, 500)  # the prediction pays
    assert not settled(Auto(Window(5)), 20)  # entmax is not torch's
    assert not settled(Auto(Window(5), Normalizer(1.0), causal=True), 20)
    assert settled(Auto(Window(5), Normalizer(1.0), crossover=30), 29)
    assert not settled(Auto(Window(5), Normalizer(1.0), crossover=30), 30)


def test_a_batch_is_settled_row_by_row(file: Path, races: list[int]) -> None:
    q, k, v, valid = vectors(2, 600, [600, 300])
    Auto(Window(5))(q, k, v, valid, 0)
    assert races == [512, 256]


def test_what_a_race_depends_on_has_an_answer_of_its_own(file: Path, races: list[int]) -> None:
    q, k, v, valid = vectors(1, 256)
    variants: list[tuple[Any, int]] = [
        *((Auto(Window(5)), 0), (Auto(Window(7)), 0), (Auto(Window(5)), 1), (Auto(Window(5), Normalizer(1.0)), 0)),
        *((Auto(Window(5), executor="blocks"), 0), (Auto(Window(5), causal=True), 0)),
    ]
    for attention, layer in variants:
        attention(q, k, v, valid, layer)
    Auto(Window(5))(q.double(), k.double(), v.double(), valid, 0)
    assert len(races) == len(json.loads(file.read_text())) == 7
    Auto(Stopwatch(Window(5)))(q, k, v, valid, 0)  # a stopwatch changes nothing
    Auto(Window(5))(q, k, v, valid, 0)
    assert len(races) == 7


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"a": 1}', '{"KEY": [5, 2]}', '{"KEY": ["a", 1]}', '{"KEY": [1]}']
)
def test_a_damaged_file_is_measured_anew(content: str, file: Path, races: list[int]) -> None:
    q, k, v, valid = vectors(1, 256)
    file.parent.mkdir()
    file.write_text(content.replace("KEY", Auto(Window(5))._key(q, k, False, 0)))
    Auto(Window(5))(q, k, v, valid, 0)
    assert races == [256]
    assert list(json.loads(file.read_text()).values())[-1] == [256, None]


def test_without_a_place_to_keep_them_answers_live_as_long_as_the_process(
    races: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv(fastest_by_length.FILE, str(tmp_path / "a file" / "crossovers.json"))
    q, k, v, valid = vectors(1, 256)
    for _ in range(2):
        Auto(Window(5))(q, k, v, valid, 0)
    assert races == [256]


def test_it_says_what_it_does_and_why(file: Path, races: list[int]) -> None:
    q, k, v, valid = vectors(1, 700)
    auto = Auto(Window(5))
    assert "not measured yet" in auto.explain(q, k, v)
    auto(q, k, v, valid, 0)
    said = auto.explain(q, k, v)
    assert said.startswith("700 tokens: the prediction, since the prediction pays from 512 tokens on")
    assert str(file) in said
    assert "native" in said
    assert Auto(Window(5), crossover=900).explain(q).startswith("700 tokens: dense attention")


def test_between_two_texts_the_number_of_keys_decides(file: Path, races: list[int]) -> None:
    q, k, v, valid = vectors(2, 300, [300, 140])
    few, few_valid = q[:, :, :20], torch.ones(2, 20, dtype=torch.bool)
    pattern = KMeans(1, Centroids([torch.zeros(2, 1, 1, 8)]))  # all in one cluster
    out = Auto(pattern, executor="blocks", crossover=200)(few, k, v, valid, 0, few_valid)
    torch.testing.assert_close(out, Dense()(few, k, v, valid, 0, few_valid))
    Auto(pattern)(few, k, v, valid, 0, few_valid)
    Auto(pattern)(q, k, v, valid, 0)
    assert races == [20, 256]  # 20 queries of 256 keys; and another question


def test_a_real_race_ends() -> None:
    q, k, v, valid = vectors(1, 130)
    assert Auto(Window(5))(q, k, v, valid, 0).shape == v.shape


def test_no_noise_decides() -> None:
    assert Bracket().with_race(2000, lambda tokens: (1.0, 0.99)) == Bracket(1536)
    assert Bracket(512, 1024).with_race(800, lambda tokens: (1.0, 0.5)) == Bracket(512, 768)


def test_a_fingerprint_is_of_the_content() -> None:
    first, same, other = (Centroids([torch.full((1, 1, 2, 2), value)]) for value in (1.0, 1.0, 2.0))
    assert (
        fastest_by_length.fingerprint(first)
        == fastest_by_length.fingerprint(same)
        != fastest_by_length.fingerprint(other)
    )


def test_a_wrong_crossover_is_said_before_any_work() -> None:
    with pytest.raises(UserError, match="crossover must be a number of tokens"):
        Auto(Window(5), crossover=-1)
