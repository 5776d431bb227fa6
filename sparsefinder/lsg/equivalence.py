"""The certificate of a conversion to LSG: what is measured before a model is saved, and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefinder.conversions.certificate import Certificate, Check, at_most, states
from sparsefinder.conversions.checks import check_finite, check_ids, check_lengths, check_positions, max_difference
from sparsefinder.conversions.measuring import (
    compare_reloaded,
    load_again,
    load_tokenizer_again,
    measuring,
    save_certified,
)
from sparsefinder.conversions.positions import audit, audit_sinusoidal
from sparsefinder.executors.local_sparse_global.attention import LSGAttention
from sparsefinder.lsg.embedding_tables import position_tables, word_table
from sparsefinder.lsg.families import Family
from sparsefinder.models import get_normalizer
from sparsefinder.numerics.normalizers import Normalizer


def certify(model: Any, tokenizer: Any, source: Any, family: Family, certificate: Certificate) -> Certificate:
    """Every check that needs no saved files: `source` is the plain model, or the LSG model, that was converted."""
    with measuring(model), measuring(source):
        return certificate.with_checks(
            *_short_inputs(model, source, family),
            *_positions(model, source, family),
            *check_ids(tokenizer, len(word_table(model))),
            *_lengths(model, tokenizer, family),
            check_finite(
                "numbers that are not finite at the maximum length",
                [output_states(model, *sample(model, family.tokens(model.config)))],
                f"one input of {family.tokens(model.config)} tokens",
            ),
        )


def save(model: Any, tokenizer: Any, certificate: Certificate, folder: str | Path) -> Certificate:
    """Save a converted model with its certificate; nothing is left behind when a check fails (`UserError`)."""
    return save_certified(model, tokenizer, certificate, folder, lambda staged: _reloaded(model, staged))


def sample(model: Any, length: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Random tokens `(rows, length)` and their mask; a second row has two thirds of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(word_table(model)), (rows, length), generator=generator)
    pad = model.config.pad_token_id
    if pad is not None:  # RoBERTa's positions skip padding ids, wherever they are
        ids[ids == pad] = (pad + 1) % len(word_table(model))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, max(1, 2 * length // 3) :] = 0
        ids[1, max(1, 2 * length // 3) :] = pad or 0
    return ids.to(model.device), mask.to(model.device)


def output_states(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states `(B, N, E)`: of the encoder where there is one, else of the decoder."""
    base = model.base_model
    part = getattr(base, "encoder", base) if model.config.is_encoder_decoder else base
    part = base.decoder if part is base and hasattr(base, "decoder") else part
    result: Tensor = part(input_ids=ids, attention_mask=mask).last_hidden_state
    return result


def normalizer_of(model: Any) -> Normalizer:
    """How a model, plain or LSG, makes probabilities of its scores; where no layer is LSG, the plain normalizer."""
    attention = next((module.lsg for module in model.modules() if hasattr(module, "lsg")), None)
    return get_normalizer(model) if attention is None else attention().normalizer


@contextmanager
def without_globals(model: Any, normalizer: Normalizer | None = None) -> Iterator[None]:
    """Let nothing see the global tokens, and take them off the output: on a short input that is the plain model.

    An LSG model attends with `normalizer`, by default its own.
    """
    config = model.config
    if not hasattr(config, "lsg_attention"):  # a plain model has none
        yield
        return
    names = ("pool_with_global", "mask_first_token", "pass_global_tokens_to_decoder")
    kept = {name: getattr(config, name) for name in names}
    modules = [(module, module.lsg) for module in model.modules() if hasattr(module, "lsg")]
    try:
        for name in names:
            setattr(config, name, False)
        for module, attention in modules:
            module.lsg = partial(_TextOnly, attention(), normalizer or attention().normalizer)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)
        for module, attention in modules:
            module.lsg = attention


class _TextOnly:
    """Dense attention of the tokens after the global ones."""

    def __init__(self, attention: LSGAttention, normalizer: Normalizer) -> None:
        self.num_globals = attention.num_global_tokens
        self.causal = attention.causal
        self.normalizer = normalizer

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int = 0, dropout: float = 0.0) -> Tensor:
        seen = valid.clone()
        seen[:, : self.num_globals] = False
        dense = LSGAttention(
            "none", block_size=q.shape[2], sparsity_factor=1, normalizer=self.normalizer, causal=self.causal
        )
        return dense(q, k, v, seen, layer)


def _short_inputs(model: Any, source: Any, family: Family) -> Iterator[Check]:
    has_globals = any(hasattr(module, "lsg") for module in model.modules())
    longest = min(family.tokens(source.config), 2 * model.config.block_size if has_globals else 512)
    lengths = sorted({1, 2, max(1, longest // 2), longest})
    own, sources = normalizer_of(model), normalizer_of(source)
    worst, apart, in_view, scale = 0.0, 0.0, 0.0, 1.0
    for length in lengths:
        ids, mask = sample(source, length, rows=2)
        with without_globals(source):
            expected = output_states(source, ids, mask)
        with without_globals(model, sources):
            worst = max(worst, max_difference(expected, output_states(model, ids, mask), mask))
            scale = max(scale, float(expected.abs().max()))
        if own != sources:
            with without_globals(model):
                apart = max(apart, max_difference(expected, output_states(model, ids, mask), mask))
        with_globals = output_states(model, ids, mask)[:, -length:]
        in_view = max(in_view, max_difference(expected, with_globals, mask))
    note = f"hidden states, {lengths} tokens, one of two rows padded"
    bound = scale * max(1e-4, 64 * torch.finfo(model.dtype).eps if model.dtype != torch.float32 else 0.0)
    name = "short-input difference to the source, global tokens out of view"
    if own == sources:
        yield at_most(name, worst, bound, note)
    else:
        remark = f"the model attends with alpha {own.alpha}, so it does not compute what the source does"
        yield states("alpha of the source's attention", sources.alpha, remark)
        yield at_most(f"{name}, the model with the source's alpha", worst, bound, f"{note}; shows that weights agree")
        yield states(name, apart, f"{note}; what alpha {own.alpha} changes")
    if has_globals:
        yield states("short-input difference to the source", in_view, f"{note}; what the global tokens change")


def _positions(model: Any, source: Any, family: Family) -> Iterator[Check]:
    reserved = family.reserved(source.config)
    sources = position_tables(source, family)
    for name, table in position_tables(model, family).items():
        before, after = sources[name].weight, table.weight
        if family.positions == "sinusoidal":
            result = audit_sinusoidal(
                before, after, layout="halves", tolerance=1e-6 if after.dtype == torch.float32 else 1e-2
            )
        else:
            result = audit(before, after, reserved=reserved)
        yield check_positions(result, f"{name}, rows that differ")


def _lengths(model: Any, tokenizer: Any, family: Family) -> Iterator[Check]:
    length, reserved = family.tokens(model.config), family.reserved(model.config)
    tables = list(position_tables(model, family).values())
    yield from check_lengths(tokenizer, length, min(len(table.weight) for table in tables), reserved)


def _reloaded(model: Any, folder: Path) -> Iterator[Check]:
    again, complete = load_again(model, folder)
    yield complete
    length = model.lsg_family.tokens(model.config)
    _, cuts_there = load_tokenizer_again(folder, length)
    yield cuts_there
    with measuring(model), measuring(again):
        ids, mask = sample(model, length)
        yield compare_reloaded(model, again, lambda loaded: output_states(loaded, ids, mask), length)
