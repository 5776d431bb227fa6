"""The C++ of `sparsefinder.executors.native` against plain references, on hostile input, and where it cannot be built."""

from __future__ import annotations

import logging
import math
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefinder.attention import Bucketed
from sparsefinder.errors import UserError
from sparsefinder.evaluation.variants import AttentionChoice
from sparsefinder.executors.native import bucketed, build, library, predictors
from sparsefinder.graphs import QK, Buckets, Layout
from sparsefinder.numerics.selection import select
from sparsefinder.patterns.routed import moments
from sparsefinder.patterns.window import Window
from sparsefinder.predictors.contrastive import _contrastive_loss, contrastive_loss
from sparsefinder.predictors.gold_pairs import GoldPairs
from sparsefinder.predictors.nearest_clusters import nearest_by_products
from sparsefinder.quantization import ProjectSettings

DTYPES = st.sampled_from([torch.float32, torch.float64])


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- predictors ----


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 99), st.integers(1, 2), st.integers(1, 3), st.integers(0, 40), st.integers(1, 70), DTYPES, st.data()
)
def test_nearest(
    seed: int, runs: int, heads: int, tokens: int, count: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    top = data.draw(st.integers(1, min(count, 3)), "top")
    x, centres = noise(seed, 2, heads, tokens, 5, dtype=dtype), noise(seed + 1, heads, runs, count, 5, dtype=dtype)
    found = predictors.nearest(x, centres, top)
    assert torch.equal(found, nearest_by_products(x, centres, top))
    one_by_one = torch.cdist(x.double()[0, 0], centres.double()[0, 0]).argsort(-1)[:, :top]
    assert torch.equal(found[0, 0, :, :top], one_by_one)


def test_nearest_of_equals_is_the_first_and_nan_stays_inside() -> None:
    x = torch.zeros(1, 1, 3, 2)
    x[0, 0, 2] = math.nan
    found = predictors.nearest(x, torch.ones(1, 1, 40, 2), 2)
    assert found[0, 0, :2].tolist() == [[0, 1], [0, 1]]
    assert ((found >= 0) & (found < 40)).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 99), st.integers(1, 3), st.integers(0, 50), st.integers(1, 9), DTYPES)
def test_moments(seed: int, heads: int, tokens: int, count: int, dtype: torch.dtype) -> None:
    x = noise(seed, 2, heads, tokens, 6, dtype=dtype)
    ids = torch.randint(count + 1, (2, heads, tokens), generator=torch.Generator().manual_seed(seed))
    for ours, plain in zip(predictors.moments(x, ids, count), moments(x, ids, count), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    members = x[1, 0, ids[1, 0] == 0].double()
    if len(members):
        torch.testing.assert_close(
            predictors.moments(x, ids, count)[2][1, 0, 0].double(), members.var(0, correction=0), rtol=1e-5, atol=1e-5
        )


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 99),
    st.sampled_from(
        [("budget", 0.02), ("budget", 0.3), ("budget", 1.0), ("margin", 0.0), ("margin", 0.4), ("margin", -0.3)]
    ),
    st.sampled_from([1.2, 1.5, 2.0]),
    st.integers(1, 60),
    st.integers(0, 80),
    DTYPES,
)
def test_routed(seed: int, rule: tuple[str, float], alpha: float, count: int, rows: int, dtype: torch.dtype) -> None:
    """Against the scores of all clusters and their selection by torch; some clusters have no key.

    Rows in which two scores, or a score and the threshold, differ by rounding alone may choose either.
    """
    q, mean = noise(seed, 2, 2, rows, 5, dtype=dtype), noise(seed + 1, 2, 2, count, 5, dtype=dtype)
    variance = noise(seed + 2, 2, 2, count, 5, dtype=dtype).square()
    numbers = torch.randint(0, 5, (2, 2, count), generator=torch.Generator().manual_seed(seed)).to(dtype)
    scores = q @ mean.mT + (q.square() @ variance.mT).sqrt()
    expected = select(scores, numbers[:, :, None], *rule, alpha)
    found = predictors.routed(q, numbers, mean, variance, *rule, alpha)
    chosen = torch.zeros_like(expected).view(-1, count)
    for row, ids in zip(chosen, found.flatten(0, 2), strict=True):
        row[ids[ids >= 0]] = True
    sure = (scores.sort(-1).values.diff() > 1e-6).all(-1, keepdim=True)
    if rule[0] == "margin":
        nearly = (select(scores, numbers[:, :, None], "margin", rule[1] + by, alpha) for by in (-1e-6, 1e-6))
        sure = sure & torch.eq(*nearly).all(-1, keepdim=True)
    assert torch.equal(chosen.view(expected.shape) & sure, expected & sure)
    kept = found >= 0
    assert found.shape[-1] == (int(kept.sum(-1).max()) if rows else 0)
    assert torch.equal(kept, kept.sort(-1, descending=True).values), "what a query does not need comes last"


@pytest.mark.parametrize("rule", ["margin", "budget"])
def test_every_head_is_routed_at_its_own_level(rule: str) -> None:
    q, mean = noise(1, 2, 3, 40, 5), noise(2, 2, 3, 30, 5)
    levels = torch.tensor([0.05, 0.6, 0.2], dtype=torch.float64)
    rest = (torch.ones(2, 3, 30), mean, noise(3, 2, 3, 30, 5).square())
    together = predictors.routed(q, *rest, rule, levels, 1.5)
    for head, level in enumerate(levels.tolist()):
        alone = predictors.routed(*(x[:, head : head + 1] for x in (q, *rest)), rule, level, 1.5)[:, 0]
        assert torch.equal(together[:, head, :, : alone.shape[-1]], alone)
        assert (together[:, head, :, alone.shape[-1] :] == -1).all()


def test_routed_to_nothing_and_by_nan() -> None:
    q, numbers, mean = torch.ones(1, 1, 3, 2), torch.ones(1, 1, 20), torch.zeros(1, 1, 20, 2)
    mean[0, 0, 7] = 3.0
    assert predictors.routed(q[:, :, :0], numbers, mean, mean * 0, "budget", 0.1, 1.5).shape == (1, 1, 0, 0)
    assert predictors.routed(q, numbers * 0, mean, mean * 0, "margin", 0.1, 1.5).shape == (1, 1, 3, 0)
    q[0, 0, 1] = math.nan
    for rule in ("budget", "margin"):
        found = predictors.routed(q, numbers, mean, mean * 0, rule, 0.05, 1.5)
        assert found.flatten().tolist() == [7, -1, 7]


# ---- pairs ----


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 99),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.2, 0.7, 1.0]),
    st.sampled_from(["pair", "row"]),
    st.booleans(),
)
def test_hinge(seed: int, tokens: int, size: int, density: float, loss: str, causal: bool) -> None:
    """Loss and gradients, against torch's; heads and rows without a positive or without a zero among them."""
    allowed = torch.ones(tokens, tokens) > 0
    allowed = allowed.tril() if causal else allowed
    graph = (torch.rand(3, tokens, tokens, generator=torch.Generator().manual_seed(seed)) < density) & allowed
    graph[0] = allowed
    gold = GoldPairs.of(graph, allowed)
    chosen = ProjectSettings(loss=loss, margin=0.5)
    results = []
    for of in (contrastive_loss, _contrastive_loss):
        q, k = (noise(seed + n, 1, 3, tokens, size).requires_grad_() for n in range(2))
        projected = QK(q, k, torch.ones(1, tokens) > 0)
        value = of(projected, gold, chosen, torch.Generator().manual_seed(seed))
        results.append((value, *torch.autograd.grad(3 * value, (q, k))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain)


# ---- attention: beyond what tests/test_attention.py asks of every executor ----


def buckets(tokens: int, slots: int, count: int) -> Buckets:
    generator = torch.Generator().manual_seed(0)
    q_ids, k_ids = (torch.randint(count, (2, 3, tokens, slots), generator=generator) for _ in range(2))
    offsets = torch.arange(slots) * count
    return Buckets(q_ids + offsets, k_ids + offsets, slots * count)


def test_threads_change_nothing() -> None:
    """A row, and a head's sums over rows, have one order: equal to the last bit."""
    layout = Layout(buckets(150, 2, 5), 5)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        q, k, v = (noise(i, 2, 3, 150, 8).requires_grad_() for i in range(3))
        out = bucketed.attend(QK(q, k, torch.ones(2, 150) > 0), v, layout, 1.5)
        results.append([out, *torch.autograd.grad(out.sin().sum(), (q, k, v))])
    torch.set_num_threads(before)
    for one, other in zip(results[0] * 2, [*results[1], *results[2]], strict=True):
        assert torch.equal(one, other)


def test_ids_that_do_not_exist_are_no_bucket() -> None:
    """Ids of padding may be anything; a wrong one elsewhere must not read beyond a list."""
    wild = buckets(40, 1, 4)
    q_ids, k_ids = wild.q_ids.clone(), wild.k_ids.clone()
    q_ids[..., 7, :], k_ids[..., 9, :], q_ids[..., 30:, :] = 1 << 40, -(1 << 40), 99
    q_ids[..., 11, :] = k_ids[..., 11, :] = 4
    qk = QK(noise(0, 2, 3, 40, 4), noise(1, 2, 3, 40, 4), (torch.arange(40) < 30).expand(2, -1))
    layout = Layout(Buckets(q_ids, k_ids, 4))
    out = bucketed.attend(qk, qk.k, layout, 1.5)
    assert not out[:, :, [7, 11]].any()
    assert out.isfinite().all()
    none = torch.tensor([7, 11])
    expected = Layout(
        Buckets(
            q_ids.clamp(0, 3).index_fill(2, none, -1), k_ids.clamp(0, 3).index_fill(2, torch.tensor([9, 11]), -1), 4
        )
    )
    torch.testing.assert_close(out, bucketed.attend(qk, qk.k, expected, 1.5))


def test_ids_and_globals_of_all_heads_at_once() -> None:
    """What is broadcast elsewhere is not read beyond its end here."""
    one = buckets(40, 2, 4)
    shared = Buckets(one.q_ids[:1, :1], one.k_ids[:1, :1].int(), one.count)
    q, k, v = (noise(i, 2, 3, 40, 4) for i in range(3))
    qk = QK(q, k, torch.ones(2, 40) > 0)
    is_global = torch.arange(40)[None] == 3
    written = Buckets(*(ids.expand(2, 3, -1, -1) for ids in (shared.q_ids, shared.k_ids.long())), one.count)
    expected = bucketed.attend(qk, v, Layout(written, 3, is_global.expand(2, -1)), 1.5)
    assert torch.equal(bucketed.attend(qk, v, Layout(shared, 3, is_global), 1.5), expected)
    with pytest.raises(ValueError, match="values must be of the shape of the keys"):
        bucketed.attend(qk, v[..., :2], Layout(written), 1.5)


@pytest.mark.parametrize("spread", [1e-5, 1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("alpha", [1.1, 1.5, 2.0])
def test_long_and_flat_rows_sum_to_one(alpha: float, spread: float) -> None:
    """Sparsemax of 16,384 scores takes up to a dozen steps, the first of which sums thousands of terms near 1."""
    tokens = 16_384
    qk = QK(torch.ones(1, 1, tokens, 1), spread * noise(0, 1, 1, tokens, 1).float(), torch.ones(1, tokens) > 0)
    of_keys = torch.zeros(1, 1, tokens, 1, dtype=torch.int64)
    of_queries = torch.full_like(of_keys, -1).index_fill(2, torch.tensor([0]), 0)  # one query alone is in the bucket
    total = bucketed.attend(qk, torch.ones_like(qk.k), Layout(Buckets(of_queries, of_keys, 1)), alpha)[0, 0, 0, 0]
    assert total.item() == pytest.approx(1.0, abs=3e-5)


@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5, 2.0])
def test_whoever_meets_nan_is_nan(alpha: float) -> None:
    """As in dense attention: a broken number is never turned into a quiet zero."""
    q, k, v = (noise(i, 1, 1, 9, 4) for i in range(3))
    k[0, 0, 4, 1] = math.nan
    out = bucketed.attend(QK(q, k, torch.ones(1, 9) > 0), v, Layout(window=3), alpha)
    assert out[0, 0].isnan().any(-1).tolist() == [i in (3, 4, 5) for i in range(9)]


# ---- building ----


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing has been built yet, and what is built is forgotten again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.forget()
    yield tmp_path
    library.forget()


def test_it_is_built_once(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load("predictors")
    (built,) = (fresh / "sparsefinder").iterdir()
    assert built.suffix == ".so"
    build.load.cache_clear()
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("it was compiled again"))
    build.load("predictors")


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One line in the log, and the same numbers from torch; who insists on C++ is told what is missing."""
    monkeypatch.setattr(shutil, "which", lambda *_: None)
    x = noise(0, 1, 2, 30, 4)
    valid = torch.ones(1, 30) > 0
    with caplog.at_level(logging.WARNING):
        slow = Bucketed(Window(5))(x, x, x, valid, 0)
        Bucketed(Window(5))(x, x, x, valid, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "no C++ compiler was found (CXX, c++, g++, clang++): install one; torch's own operations are used instead, slower"
    ]
    with pytest.raises(UserError, match=r"executor=native: no C\+\+ compiler was found .* or choose executor=blocks"):
        Bucketed(Window(5), executor="native")
    monkeypatch.undo()
    library.forget()
    torch.testing.assert_close(Bucketed(Window(5), executor="native")(x, x, x, valid, 0), slow)


def test_a_compiler_that_fails(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = fresh / "broken"
    broken.write_text("#!/bin/sh\necho 'bucketed.cpp:1: error: no such machine' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(UserError, match=r"could not compile bucketed\.cpp .*error: no such machine"):
        build.load("bucketed")
    assert not list((fresh / "sparsefinder").iterdir())


def test_a_compiler_that_takes_too_long(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, and so do the programs that it started, which would go on for hours on a machine that is too small for them."""
    slow = fresh / "slow"
    slow.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {fresh}/child\nwait\n")
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(slow))
    monkeypatch.setattr(build, "_seconds", lambda: 1)
    with pytest.raises(UserError, match=r"took more than 1 s over bucketed\.cpp"):
        build.load("bucketed")
    child = Path("/proc") / (fresh / "child").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_cache_that_cannot_be_written(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "file"))
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    build.load("predictors")
    assert list(tmp_path.glob("sparsefinder-*/predictors-*.so"))


def test_a_folder_that_others_can_write_is_not_loaded_from(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh / "temporary").mkdir()
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(fresh / "temporary"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(build.Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home"))))
    build.load("predictors")
    (folder,) = (fresh / "temporary").iterdir()
    folder.chmod(0o777)
    build.load.cache_clear()
    with pytest.raises(UserError, match="belongs to or can be written by others"):
        build.load("predictors")


def test_executors_that_do_not_exist_or_cannot_be() -> None:
    with pytest.raises(UserError, match="executor=gpu is unknown; choose one of auto, native, tailed, blocks, triton"):
        Bucketed(Window(3), executor="gpu")
    with pytest.raises(UserError, match="executor=gpu is unknown"):  # before a pattern is at hand, and any work is done
        AttentionChoice("bucketed", Bucketed, {"executor": "gpu"})
    x = torch.zeros(1, 1, 4, 2, device="meta")
    with pytest.raises(
        UserError, match="executor=native: runs on a CPU, the queries are on meta, or choose executor=blocks"
    ):
        Bucketed(Window(3), executor="native")(x, x, x, torch.ones(1, 4) > 0, 0)
