"""The attention on bare tensors: against loops over tokens, against its own graph, and under padding."""

import dataclasses

import pytest
import torch
from lsg_plain import plain_lsg

from sparsefinder.errors import UserError
from sparsefinder.executors.local_sparse_global.attention import LSGAttention
from sparsefinder.executors.local_sparse_global.block_layout import attend
from sparsefinder.executors.local_sparse_global.settings import SPARSITY_TYPES
from sparsefinder.graphs import QK
from sparsefinder.numerics.normalizers import Normalizer

LAYOUTS = {
    "usual": {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2, "num_global_tokens": 1},
    "narrow": {"block_size": 8, "sparse_block_size": 4, "sparsity_factor": 4, "num_global_tokens": 3},
    "wide": {"block_size": 4, "sparse_block_size": 6, "sparsity_factor": 2, "num_global_tokens": 0},
    "one key": {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 4, "num_global_tokens": 2},
    "every key": {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 1, "num_global_tokens": 1},
}


def tensors(lengths=(37, 21, 6), heads=3, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = max(lengths)
    q, k, v = (2 * torch.randn(len(lengths), heads, tokens, size, generator=generator) for _ in range(3))
    valid = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return q, k, v, valid


def dense_on(graph, q, k, v, normalizer):
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~graph, -torch.inf)
    return normalizer(scores) @ v


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_agrees_with_loops_over_tokens(sparsity_type, layout):
    q, k, v, valid = tensors()
    for causal in (False, True):
        for alpha, masked in ((1.0, False), (1.5, True)):
            spec = LSGAttention(
                sparsity_type, **LAYOUTS[layout], mask_first_token=masked, causal=causal, normalizer=Normalizer(alpha)
            )
            torch.testing.assert_close(
                spec(q, k, v, valid, 2), plain_lsg(q, k, v, valid, spec, 2), atol=2e-5, rtol=1e-4
            )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_measured_graph_is_the_graph_that_runs(sparsity_type, causal, layout):
    q, k, v, valid = tensors()
    spec = LSGAttention(sparsity_type, **LAYOUTS[layout], causal=causal, mask_first_token=True)
    qk = QK(q, k, valid, causal)
    graph = spec.graph(qk, 0)
    if spec.pooled:
        assert graph is None
        return
    assert not (graph & ~qk.allowed).any()
    torch.testing.assert_close(spec(q, k, v, valid), dense_on(graph, q, k, v, spec.normalizer), atol=2e-5, rtol=1e-4)
    pairs = spec.computed_pairs(qk, 0)
    assert pairs.shape == q.shape[:2]
    assert (pairs >= graph.sum((-1, -2))).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_padding_order_and_history_change_nothing(sparsity_type, causal):
    q, k, v, valid = tensors()
    spec = LSGAttention(sparsity_type, **LAYOUTS["usual"], causal=causal)
    batched = spec(q, k, v, valid, 1)
    assert (batched[~valid[:, None].expand(-1, 3, -1)] == 0).all()
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(spec(q[order], k[order], v[order], valid[order], 1), batched[order])
    garbage = [torch.where(valid[:, None, :, None], x, torch.nan) for x in (q, k, v)]
    torch.testing.assert_close(spec(*garbage, valid, 1), batched)
    for example, length in enumerate(valid.sum(-1).tolist()):
        alone = [x[example : example + 1, :, :length] for x in (q, k, v)]
        expected = spec(*alone, valid[example : example + 1, :length], 1)
        torch.testing.assert_close(batched[example : example + 1, :, :length], expected, atol=2e-6, rtol=1e-5)
        left = [torch.nn.functional.pad(x, (0, 0, 5, 0), value=3.0) for x in alone]
        shifted = spec(*left, torch.nn.functional.pad(valid[example : example + 1, :length], (5, 0)), 1)
        torch.testing.assert_close(shifted[:, :, 5:], expected, atol=2e-6, rtol=1e-5)
        assert (shifted[:, :, :5] == 0).all()


def test_left_padded_graph_is_the_shifted_graph():
    q, k, _, valid = tensors((37,))
    spec = LSGAttention("norm", **LAYOUTS["usual"])
    pad = torch.nn.functional.pad
    shifted = spec.graph(QK(pad(q, (0, 0, 5, 0)), pad(k, (0, 0, 5, 0)), pad(valid, (5, 0))))
    assert torch.equal(shifted[:, :, 5:, 5:], spec.graph(QK(q, k, valid)))
    assert not shifted[:, :, :5].any()
    assert not shifted[..., :5].any()


def test_short_inputs_run_dense_and_say_so():
    q, k, _, valid = tensors((9, 4))
    spec = LSGAttention("pooling", **LAYOUTS["usual"])
    qk = QK(q, k, valid)
    assert torch.equal(spec.graph(qk), qk.allowed.expand(-1, 3, -1, -1))
    assert (spec.computed_pairs(qk) == 81).all()
    q, k, _, valid = tensors((10,))
    assert spec.graph(QK(q, k, valid)) is None
    # 9 tokens fill three blocks of 4; each query has 1 global + 2 × 4 sparse + 12 local keys in view; the global one has 10
    assert (spec.computed_pairs(QK(q, k, valid)) == 12 * 21 + 10).all()


def test_causal_attention_never_looks_ahead():
    q, k, v, valid = tensors((33,))
    for sparsity_type in SPARSITY_TYPES:
        spec = LSGAttention(sparsity_type, **LAYOUTS["usual"], causal=True)
        before = spec(q, k, v, valid)
        changed = [torch.cat([x[:, :, :20], -x[:, :, 20:] + 1.0], dim=2) for x in (q, k, v)]
        torch.testing.assert_close(spec(*changed, valid)[:, :, :20], before[:, :, :20])


@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_gradients_agree_with_numbers(sparsity_type):
    q, k, v, valid = (x.double() if x.is_floating_point() else x for x in tensors((13, 9), heads=1, size=4))
    spec = LSGAttention(sparsity_type, 4, 4, 2, 1)
    for x in (q, k, v):
        x.requires_grad_()
    if sparsity_type == "lsh":  # sums are taken in float32: only check that gradients reach every real key
        spec(q, k, v, valid).square().sum().backward()
        assert all((x.grad[0].abs().sum(-1) > 0).all() and torch.isfinite(x.grad).all() for x in (k, v))
        return
    spec = dataclasses.replace(spec)
    assert torch.autograd.gradcheck(
        lambda *x: spec(*x, valid), (q, k, v), eps=1e-4, atol=2e-3, rtol=2e-2, nondet_tol=1e-7
    )


def test_query_without_keys_has_finite_gradient():
    q, k, v, valid = tensors((30, 1))
    q.requires_grad_()
    spec = LSGAttention("stride", 4, 4, 2, 0, mask_first_token=True)
    output = spec(q, k, v, valid)
    assert (output[1] == 0).all()
    output.sum().backward()
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity_type", SPARSITY_TYPES)
def test_half_precision_stays_within_its_rounding(sparsity_type, dtype):
    q, k, v, valid = tensors()
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for alpha in (1.0, 1.5):
        spec = LSGAttention(sparsity_type, **LAYOUTS["usual"], normalizer=Normalizer(alpha))
        expected = spec(q.float(), k.float(), v.float(), valid)
        assert spec(q, k, v, valid).dtype == dtype
        error = (spec(q, k, v, valid).float() - expected).abs().max()
        assert error < 40 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("autocast", [False, True])
def test_entmax_scores_are_not_rounded_to_half_precision(autocast):
    """In bfloat16, and under autocast, with float32's support: values that are unit vectors give the probabilities."""
    q, k = (4 * torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    q, k = (x.bfloat16() for x in (q, k))
    expected = Normalizer(1.5)(q.float() @ k.float().transpose(-1, -2) / 8**0.5)
    given = (q.float(), k.float()) if autocast else (q, k)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = attend(*given, torch.eye(20).expand(2, 3, -1, -1), None, Normalizer(1.5))
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected)


def test_lsh_is_fixed_by_seed_and_layer():
    q, k, v, valid = tensors()
    spec = LSGAttention("lsh", 8, 8, 2, 1)
    assert torch.equal(spec(q, k, v, valid, 0), spec(q, k, v, valid, 0))
    assert not torch.equal(spec(q, k, v, valid, 0), spec(q, k, v, valid, 1))
    assert not torch.equal(spec(q, k, v, valid, 0), dataclasses.replace(spec, seed=4)(q, k, v, valid, 0))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsity_type": "norms"}, "norm, pooling, lsh, stride, block_stride, bos_pooling, none"),
        ({"block_size": 10, "sparsity_factor": 4}, "block_size 10 is not divisible by sparsity_factor 4"),
        ({"num_global_tokens": 513}, "512"),
        ({"block_size": 0}, "at least 1"),
        ({"block_size": 8, "sparse_block_size": 6}, "sparse_block_size 6"),
        ({"lsh_num_pre_rounds": -1}, "0 or more"),
    ],
)
def test_bad_settings_are_refused_in_one_line(fields, words):
    with pytest.raises(UserError, match=words) as error:
        LSGAttention(**fields)
    assert "\n" not in str(error.value)


def test_null_means_none():
    assert LSGAttention(None) == LSGAttention("none")
