"""``sparsefinder.fit``: from a model and some texts to an index."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsefinder.attention import Dense
from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.experiment.targets import whole_numbered
from sparsefinder.graphs import reads_ahead
from sparsefinder.models import ModelShape, describe, get_normalizer, plugged
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.refined import Refined
from sparsefinder.sparse_model.attaching import transformer_of
from sparsefinder.sparse_model.curves import Curves, Target
from sparsefinder.sparse_model.index import BaseModel, Index, hash_of_weights
from sparsefinder.sparse_model.learning import learn
from sparsefinder.sparse_model.measuring import difference, measured_curves, outputs
from sparsefinder.sparse_model.named_patterns import NamedPattern, named_pattern
from sparsefinder.sparse_model.texts import Reading, read_texts
from sparsefinder.storage.manifests import versions

log = logging.getLogger(__name__)

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the whole model, at which its output is compared with the dense one
_LENGTH = 2048  # tokens that are read at a time, where the model reads more
_MEASURED = 8  # held-out texts at most that are measured on


def fit(
    model: Any,
    tokenizer: Any,
    texts: Any,
    *,
    pattern: Any = None,
    window: int | None = None,
    global_tokens: int = 0,
    last_token: bool = False,
    length: int | None = None,
    tokens: int = 32_768,
    seed: int = 0,
) -> Index:
    """Learn what predicts the attention of a model, from texts like those that it will read.

    The model is read with its own attention, whatever is attached, and not changed. The result depends on the model, the texts
    and the seed alone.

    Args:
        model: A model of transformers with any head or none, an encoder or a decoder of `sparsefinder.models.families.TRAITS`;
            or one of sentence-transformers. Of a decoder clusters of keys have one level, and nothing reads later words.
        tokenizer: Its tokenizer.
        texts: Strings, an iterable of them, or a `datasets.Dataset`; one long string will do. A tenth is held out to measure on.
        pattern: The name of a file in ``conf/pattern``, or a pattern object; None for ``refined`` where the model has softmax,
            else ``routed``.
        window: Odd; keys around a query that are always there. None for none.
        global_tokens: The first so many tokens see all and are seen by all.
        last_token: So does the last one.
        length: Tokens that are read at a time; None for what the model can read, 2,048 at most.
        tokens: Enough to learn from; further texts are not read.
        seed: Draws texts, tokens and centroids.

    Returns:
        What `sparsefinder.attach` takes.

    Raises:
        UserError: For a model whose attention cannot be replaced, texts that are too few or empty, a length beyond the model,
            a pattern that there is not, and one that reads ahead in a decoder.
    """
    start = time.perf_counter()
    encoder = transformer_of(model)
    if not callable(tokenizer):
        raise UserError(
            f"tokenizer is a {type(tokenizer).__name__}: give the model's, AutoTokenizer.from_pretrained(...)"
        )
    if not isinstance(tokens, int) or tokens < 1:
        raise UserError(
            f"tokens={tokens!r}: give a whole number, 1 or more; some ten thousand are enough to learn from"
        )
    shape, normalizer = describe(encoder), get_normalizer(encoder)
    length = min(shape.max_length, _LENGTH) if length is None else length
    if not isinstance(length, int) or not 3 < length <= shape.max_length:
        raise UserError(
            f"length={length!r}: this model reads up to {shape.max_length} tokens; give fewer, and more than 3"
        )
    named = _named(pattern, normalizer, seed)
    configuration = Configuration(named.name, named.pattern, window, global_tokens, last_token)
    reading = read_texts(texts, tokenizer, length, tokens, seed)
    training = encoder.training
    try:
        encoder.eval()
        base = _base(encoder, shape, normalizer.alpha)
        learned = learn(configuration.needs, encoder, list(reading.training), Dense(normalizer, base.causal), seed)
        if base.causal and (ahead := reads_ahead(configuration.build(learned))):
            raise UserError(f"pattern={named.name} reads ahead in a decoder ({ahead}): choose another, such as refined")
        index = Index(base, configuration, learned)
        if named.sweep:
            index = _calibrated(encoder, index, reading.held_out[:_MEASURED], named.sweep)
    finally:
        encoder.train(training)
    facts = _facts(reading, length, seed, time.perf_counter() - start)
    log.info("fit: %s in %.0f seconds", configuration.label, facts["seconds"])
    return replace(index, facts=facts)


def _named(pattern: Any, normalizer: Normalizer, seed: int) -> NamedPattern:
    """What somebody asked for, or what a model with this normalizer is best served with."""
    named = named_pattern(pattern or ("routed" if normalizer.sparse else "refined"), normalizer.alpha, seed)
    if isinstance(named.pattern, Refined) and not isinstance(pattern, Refined):
        # its entries weigh as they do in the attention, softmax included
        named = replace(named, pattern=replace(named.pattern, alpha=normalizer.alpha))
    return named


def _base(model: Any, shape: ModelShape, alpha: float) -> BaseModel:
    content = hash_of_weights(model.base_model)
    return BaseModel(str(model.name_or_path), shape.family, content, shape.layers, shape.heads, shape.head_size, alpha)


def _calibrated(model: Any, index: Index, texts: Sequence[Tensor], sweep: Sequence[Any]) -> Index:
    """With curves of the heads, and what the whole model gives at some densities."""
    configuration = index.configuration
    parameter = configuration.pattern.sparsity_parameter
    attentions = {}
    for value in sweep:
        try:
            turned = replace(configuration, pattern=replace(configuration.pattern, **{parameter: value}))
            attentions[float(value)] = replace(index, configuration=turned).attention(
                index.setting(None, False, "auto")
            )
        except UserError:  # a value that these artefacts do not allow, such as more clusters than there are
            continue
    if not attentions:
        raise UserError(
            f"pattern={configuration.name}: none of its values {list(sweep)} can be had here; give another pattern"
        )
    whole = whole_numbered(configuration.pattern)
    shape = index.base.layers, index.base.heads
    curves = measured_curves(model, texts, attentions, index.dense, shape, whole)
    index = replace(index, curves=curves)
    return replace(index, quality=tuple(_quality(model, index, curves, texts)))


def _quality(model: Any, index: Index, curves: Curves, texts: Sequence[Tensor]) -> list[dict[str, float]]:
    dense = outputs(model, texts)
    rows: list[dict[str, float]] = []
    for density in DENSITIES:
        setting = index.setting(Target("density", density), False, "auto")
        assert setting.values is not None
        with plugged(model, index.attention(setting)):
            sparse = outputs(model, texts)
        rows.append(
            {
                "density": density,
                "measured_density": float(curves.read("density", setting.values).mean()),
                "recall": float(curves.read("recall", setting.values).mean()),
                "difference": difference(dense, sparse),
                "tokens": max(len(states) for states in dense),
            }
        )
    return rows


def _facts(reading: Reading, length: int, seed: int, seconds: float) -> dict[str, Any]:
    return {
        "texts": len(reading.training),
        "tokens": reading.tokens,
        "texts_held_out": len(reading.held_out),
        "length": length,
        "seed": seed,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
