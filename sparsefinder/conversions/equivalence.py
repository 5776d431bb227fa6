"""Prove a conversion against its source, and save the model with the proof or not at all.

`save` measures in float32, on random tokens from a fixed seed, in evaluation mode; model and source are left as they
were.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsefinder.conversions import nystromformer
from sparsefinder.conversions.certificate import Certificate, Check, at_most, equals, states
from sparsefinder.conversions.checks import check_finite, check_ids, check_lengths, check_positions, max_difference
from sparsefinder.conversions.expectations import EXACT, Comparison, compare
from sparsefinder.conversions.measuring import (
    compare_reloaded,
    in_float32,
    load_again,
    load_tokenizer_again,
    measuring,
    save_certified,
)
from sparsefinder.conversions.positions import POSITION_BUFFERS, audit
from sparsefinder.conversions.roberta_source import base_of, word_rows
from sparsefinder.conversions.staging import refuse_existing
from sparsefinder.errors import UserError
from sparsefinder.models import get_normalizer, set_normalizer
from sparsefinder.numerics.normalizers import Normalizer

_RELOAD_LENGTH = 1024


def save(model: PreTrainedModel, tokenizer: Any, source: PreTrainedModel, out: str | Path) -> Certificate:
    """Check a converted model against the source it was made from, and save it with the proof or not at all.

    Args:
        model: the converted model.
        tokenizer: its tokenizer.
        source: the model that it was made from.
        out: the folder to make: what `save_pretrained` writes, `conversion.json` and the certificate in `README.md`.

    Returns:
        The certificate.

    Raises:
        UserError: if `out` exists, and if a check fails: then nothing is left behind.
    """
    refuse_existing(out)
    certificate = certify(model, tokenizer, source)
    return save_certified(model, tokenizer, certificate, out, lambda folder: _reload_checks(model, tokenizer, folder))


def certify(model: PreTrainedModel, tokenizer: Any, source: PreTrainedModel) -> Certificate:
    """Every check of a conversion that needs no saving; see `docs/reference/conversions.md` for what they are.

    Args:
        model: the converted model.
        tokenizer: its tokenizer.
        source: the model that it was made from.

    Returns:
        The certificate, whether its checks passed or not.

    Raises:
        UserError: for a target that this package does not make, or a source that the target is not made from.
    """
    for given, what in ((model, "a converted model"), (source, "the model that it was made from")):
        if not isinstance(given, PreTrainedModel):
            raise UserError(f"a {type(given).__name__} came; needed: {what}, loaded by transformers")
    alpha = get_normalizer(source).alpha
    with measuring(in_float32(model)) as target, measuring(in_float32(source)) as original, _softmax(original):
        comparison = compare(target, tokenizer, original)
        name = source.name_or_path or type(source).__name__
        certificate = Certificate(
            source=name, target=target.config.model_type.replace("_", ""), settings=comparison.settings
        )
        if alpha != 1.0:
            remark = "the source attends with entmax, the target with softmax: compared with the source's softmax"
            certificate = certificate.with_checks(states("alpha of the source's attention", alpha, remark))
        with _positions_as_saved(original, comparison, model.dtype if model.dtype == source.dtype else torch.float32):
            differences = (*_difference_checks(target, original, tokenizer, comparison),)
        return certificate.with_checks(
            *differences,
            *_table_checks(target, original, tokenizer, comparison, model.dtype),
            *check_ids(tokenizer, word_rows(target)),
            check_finite(
                "outputs that are not finite at the maximum length",
                [_states(target, *_tokens(target, tokenizer, comparison.length))],
                f"one input of {comparison.length} tokens",
            ),
        )


def _difference_checks(target: Any, source: Any, tokenizer: Any, comparison: Comparison) -> Iterator[Check]:
    lengths = sorted({1, 2, comparison.equal_up_to // 2, comparison.equal_up_to - 1, comparison.equal_up_to} - {0})
    for marked in (False, True) if comparison.global_tokens else (False,):
        worst = 0.0
        for length in lengths:
            ids, valid = _tokens(target, tokenizer, length, padded=True)
            with comparison.equal_mode(length):
                states_of_target = _states(target, ids, valid, marked)
            worst = max(worst, max_difference(_states(source, ids, valid, marked), states_of_target, valid))
        name = "short-input difference of hidden states" + (", first token global" if marked else "")
        note = f"{comparison.mode}; lengths {lengths}, one of two rows padded"
        yield at_most(name, worst, EXACT, note)
    ids, valid = _tokens(target, tokenizer, comparison.source_length)
    if comparison.own_mode is not None:
        with comparison.own_mode():
            distance = max_difference(_states(source, ids, valid), _states(target, ids, valid), valid)
        yield states(
            "difference at the source's maximum length",
            distance,
            f"{comparison.source_length} tokens; the approximation before any training",
        )
    logits = _logits(source, *_tokens(target, tokenizer, lengths[-1]))
    if logits is None or target.config.is_encoder_decoder:
        return
    with comparison.equal_mode(lengths[-1]):
        logits_of_target = _logits(target, *_tokens(target, tokenizer, lengths[-1]))
    assert logits_of_target is not None
    difference = max_difference(logits, logits_of_target)
    if comparison.head_exact:
        yield at_most("short-input difference of logits", difference, EXACT * max(1.0, float(logits.abs().max())))
    else:
        yield states("short-input difference of logits", difference, "the target's head computes something else")


@contextmanager
def _positions_as_saved(source: Any, comparison: Comparison, dtype: torch.dtype) -> Iterator[None]:
    """The source with position rows as a target of half precision can hold them, for a while.

    Where the target keeps a constant of the source in its position rows, their sum is rounded once more (by half a unit in the
    last place, 0.001 at 2 in float16). That is how half precision is, and no fault of the conversion, which is then exact.
    """
    table = base_of(source).embeddings.position_embeddings.weight
    exact = table.data
    if comparison.shift is not None and dtype != torch.float32:
        table.data = (exact + comparison.shift).to(dtype).float() - comparison.shift
    try:
        yield
    finally:
        table.data = exact


def _table_checks(
    target: Any, source: Any, tokenizer: Any, comparison: Comparison, dtype: torch.dtype
) -> Iterator[Check]:
    # the sum with a constant of the source is rounded to the target's dtype
    rounding = max(1e-6, torch.finfo(dtype).eps if dtype != torch.float32 else 0.0)
    source_rows = base_of(source).embeddings.position_embeddings.weight
    for name, rows in comparison.positions(target).items():
        result = audit(
            source_rows,
            rows,
            reserved=comparison.source_reserved,
            target_reserved=comparison.target_reserved,
            target_shift=comparison.shift,
            tolerance=0.0
            if comparison.shift is None
            else rounding * max(1.0, float((source_rows + comparison.shift).abs().max())),
        )
        yield check_positions(result, f"{name}, rows that differ")
    rows = next(iter(comparison.positions(target).values()))
    rounded = -(-comparison.length // comparison.padded_to) * comparison.padded_to
    yield from check_lengths(tokenizer, comparison.length, len(rows), comparison.target_reserved)
    if rounded != comparison.length:
        last = comparison.target_reserved + rounded - 1
        yield at_most("last position row with the padding inside", last, len(rows) - 1, f"padded to {rounded}")
    for module in target.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in POSITION_BUFFERS:
                yield equals(f"entries of the buffer {name}", buffer.shape[-1], len(rows) - comparison.target_reserved)


def _reload_checks(model: PreTrainedModel, tokenizer: Any, folder: Path) -> Iterator[Check]:
    again, complete = load_again(model, folder)
    yield complete
    saved, loaded_weights = model.state_dict(), again.state_dict()
    changed = [name for name, tensor in saved.items() if not torch.equal(tensor, loaded_weights[name])]
    yield equals("weights that differ after reload", len(changed), 0, ", ".join(changed[:5]))
    length = int(tokenizer.model_max_length)
    tokenizer_again, cuts_there = load_tokenizer_again(folder, length)
    text = " ".join(list(tokenizer.get_vocab())[:200])
    same = tokenizer(text, truncation=True)["input_ids"] == tokenizer_again(text, truncation=True)["input_ids"]
    yield equals("tokenizer gives the same ids after reload", same, True)
    yield cuts_there
    with measuring(in_float32(model)) as before, measuring(in_float32(again)) as after:
        # Weights were compared one by one; an input of moderate length shows that the configuration agrees as well.
        tried = min(length, nystromformer.needed_length(model) or _RELOAD_LENGTH)
        ids, valid = _tokens(model, tokenizer, tried)
        yield compare_reloaded(before, after, lambda loaded: _states(loaded, ids, valid), tried)


@contextmanager
def _softmax(source: PreTrainedModel) -> Iterator[None]:
    """The source with softmax attention, whatever it remembers, for a while."""
    own = get_normalizer(source)
    if own.alpha == 1.0:
        yield
        return
    set_normalizer(source, Normalizer(1.0))
    try:
        yield
    finally:
        set_normalizer(source, own)


def _tokens(model: Any, tokenizer: Any, length: int, *, padded: bool = False) -> tuple[Tensor, Tensor]:
    """Random tokens `(1, length)`, between the tokens for beginning and end, and which are real.

    With `padded`, a second row of half the length.
    """
    special = set(tokenizer.all_special_ids)
    vocabulary = sorted(set(tokenizer.get_vocab().values()))
    ordinary = torch.tensor([index for index in vocabulary if index not in special] or vocabulary)
    draw = torch.randint(len(ordinary), (2, length), generator=torch.Generator().manual_seed(0))
    ids, valid = ordinary[draw], torch.ones(2, length, dtype=torch.long)
    for row, real in enumerate((length, (length + 1) // 2)):
        if real > 1 and tokenizer.bos_token_id is not None and tokenizer.eos_token_id is not None:
            ids[row, 0], ids[row, real - 1] = tokenizer.bos_token_id, tokenizer.eos_token_id
        ids[row, real:] = model.config.pad_token_id
        valid[row, real:] = 0
    keep = 2 if padded else 1
    return ids[:keep].to(model.device), valid[:keep].to(model.device)


def _states(model: Any, ids: Tensor, valid: Tensor, marked: bool = False) -> Tensor:
    """Last hidden states `(B, N, E)`, of the encoder where there are two; with `marked`, the first token is global."""
    base = base_of(model)
    encoder: Any = base.get_submodule("encoder") if model.config.is_encoder_decoder else base
    extra = _global_mask(model, ids)
    if marked and extra:
        extra["global_attention_mask"][:, 0] = 1
    states_: Tensor = encoder(input_ids=ids, attention_mask=valid, **extra).last_hidden_state
    return states_


def _logits(model: Any, ids: Tensor, valid: Tensor) -> Tensor | None:
    """What the head says, with no token global; None for a model without a head."""
    if base_of(model) is model:
        return None
    inputs = {"input_ids": ids, "attention_mask": valid, **_global_mask(model, ids)}
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: tensor[:, None] for name, tensor in inputs.items()}
    outputs = model(**inputs)
    return torch.stack([outputs.start_logits, outputs.end_logits]) if "start_logits" in outputs else outputs.logits


def _global_mask(model: Any, ids: Tensor) -> dict[str, Tensor]:
    return {"global_attention_mask": torch.zeros_like(ids)} if model.config.model_type in ("longformer", "led") else {}
