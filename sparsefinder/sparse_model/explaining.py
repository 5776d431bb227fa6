"""``sparsefinder.explain``: what the attached graph does on texts, head by head, and what multiplies it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefinder.attention import Dense
from sparsefinder.errors import UserError
from sparsefinder.graphs import Attention
from sparsefinder.models import plugged
from sparsefinder.sparse_model.attaching import attachment, transformer_of
from sparsefinder.sparse_model.measuring import difference, head_sums, outputs
from sparsefinder.sparse_model.texts import strings_of, token_ids

_MOST = 16  # texts that are looked at
_REPEATS = 3  # of a time, whose least is taken


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printed, a table.

    Args:
        heads: A row for each head: ``layer``, ``head``, ``value`` of the sparsity parameter, ``density``, ``recall``, ``error``.
        layers: A row for each layer: ``layer``, seconds of the ``sparse`` and of the ``dense`` attention.
        target: What the values were chosen for.
        tokens: Of the longest text.
        difference: 1 − the cosine of the mean-pooled output to that of the dense model.
        runs: What multiplies the longest text, and why.
    """

    heads: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...]
    target: str
    tokens: int
    difference: float
    runs: str

    def __str__(self) -> str:
        lines = [
            f"{self.target}; difference to the dense model {self.difference:.2g} on texts of up to {self.tokens:,} tokens"
        ]
        lines += ["layer  head    value  density  recall   error"]
        lines += [
            f"{r['layer']:5}  {r['head']:4}  {'' if r['value'] is None else format(r['value'], '.4g'):>7}  {r['density']:7.3f}  "
            f"{r['recall']:6.3f}  {r['error']:6.3f}"
            for r in self.heads
        ]
        lines += ["layer  sparse, ms  dense, ms"]
        lines += [f"{r['layer']:5}  {1e3 * r['sparse']:10.2f}  {1e3 * r['dense']:9.2f}" for r in self.layers]
        return "\n".join([*lines, self.runs])


def explain(model: Any, texts: Any, tokenizer: Any = None) -> Explanation:
    """What the graph that is attached to a model does on some texts.

    Args:
        model: With an index attached.
        texts: Strings, or token ids ``(1, n)``; sixteen at most are read.
        tokenizer: Of the model; None for that of a SentenceTransformer, or to load it by the model's name.

    Raises:
        UserError: Where nothing is attached, or no text is given.
    """
    encoder, found = transformer_of(model), attachment(model)
    ids = _ids(encoder, texts, tokenizer or getattr(model, "tokenizer", None))
    index, setting = found.index, found.setting
    sparse, dense = index.attention(setting), index.dense
    shape = index.base.layers, index.base.heads
    training = encoder.training
    try:
        encoder.eval()
        sums = head_sums(encoder, ids, [sparse], dense, shape)
        with plugged(encoder, dense):
            expected = outputs(encoder, ids)
        with plugged(encoder, sparse):
            measured = outputs(encoder, ids)
        longest = max(ids, key=lambda each: each.shape[1])
        times = [_seconds(encoder, longest, each, shape[0]) for each in (sparse, dense)]
    finally:
        encoder.train(training)
    heads = tuple(
        {
            "layer": layer,
            "head": head,
            "value": None if setting.values is None else setting.values[layer][head],
            "density": float(sums.density[0, layer, head] / sums.texts),
            "recall": float(sums.recall[0, layer, head] / sums.texts),
            "error": math.sqrt(sums.error[0, layer, head] / max(float(sums.output[layer, head]), 1e-300)),
        }
        for layer in range(shape[0])
        for head in range(shape[1])
    )
    layers = tuple({"layer": i, "sparse": s, "dense": d} for i, (s, d) in enumerate(zip(*times, strict=True)))
    return Explanation(
        heads,
        layers,
        f"{index.configuration.label} at {setting.target or 'its own setting'}",
        longest.shape[1],
        difference(expected, measured),
        _what_runs(encoder, dense, longest, found),
    )


def _ids(encoder: Any, texts: Any, tokenizer: Any) -> list[Tensor]:
    if isinstance(texts, (list, tuple)) and texts and all(isinstance(each, Tensor) for each in texts):
        return list(texts)[:_MOST]
    strings = [text for text in strings_of(texts) if text.strip()][:_MOST]
    if not strings:
        raise UserError("there is no text to explain: give one string or more")
    if tokenizer is None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(encoder.name_or_path, trust_remote_code=False)
    from sparsefinder.models import describe

    return [token_ids(tokenizer, text, describe(encoder).max_length) for text in strings]


class _Stopwatch:
    """An attention whose calls are timed, each layer apart."""

    def __init__(self, attention: Attention, layers: int):
        self.attention = attention
        self.seconds = [math.inf] * layers
        self.causal = bool(getattr(attention, "causal", False))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        start = _now(q.device)
        output = self.attention(q, k, v, valid, layer)
        self.seconds[layer] = min(self.seconds[layer], _now(q.device) - start)
        return output


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _seconds(encoder: Any, ids: Tensor, attention: Attention, layers: int) -> list[float]:
    watch = _Stopwatch(attention, layers)
    with plugged(encoder, watch):
        for _ in range(_REPEATS):
            outputs(encoder, [ids])
    return watch.seconds


def _what_runs(encoder: Any, dense: Dense, ids: Tensor, found: Any) -> str:
    size = found.index.base.head_size
    q = torch.empty(1, found.index.base.heads, ids.shape[1], size, device=encoder.device, dtype=encoder.dtype)
    lines = [f"{name}:\n{each.explain(q, q, q)}" for name, each in _explaining(found, dense).items()]
    return "\n".join(lines)


def _explaining(found: Any, dense: Dense) -> dict[str, Any]:
    sparse = found.index.attention(found.setting)
    return {"sparse": sparse, "dense": dense} if hasattr(sparse, "explain") else {"dense": dense}
