"""A whole sentence encoder, lengthened, against its SDPA self: time and memory beside what becomes of its embeddings.

    python benchmarks/encoder.py --model FOLDER --train valid.txt --test test.txt            # ten minutes on two cores
    python benchmarks/encoder.py --model FOLDER --train A --test B --tokens 512 --documents 2 # a try

A position table that is too short is repeated, as the converters do. Patterns learn from 24 texts of 512 tokens of ``--train``;
everything is measured on ``--test``, cut into stretches of each length. Softmax throughout, batch 1, float32.

Of every arm, all layers replaced: the median time of interleaved rounds on the first document, predictor inside; how many times
as fast as the model's own SDPA; peak memory; and over the documents (20, or as many as the text has) the cosine of pooled
documents and of token states with those of the dense model. ``no attention`` hands the values through: Amdahl's bound, which
no attention can beat. Whatever an arm reaches of it stands in the last column. ``auto`` is what users plug in: below 1,024 tokens
it is measured alone, with more rounds, since there it must not be slower than SDPA.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import recorded
import torch
from measuring import Measured, machine, measure
from torch import Tensor

from sparsefinder import models
from sparsefinder.attention import Bucketed
from sparsefinder.auto_attention import Auto
from sparsefinder.evaluation.tasks.embedding import pooled, token_cosines
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.graphs import Attention, Pattern
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.refined import Refined
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.window import Window

BASELINE, BOUND, AUTO = "SDPA softmax", "no attention", "auto"
SHORT = 1024  # tokens up to which `auto` must be as fast as SDPA
SOFTMAX = Normalizer(1.0)


@dataclass(frozen=True)
class Row:
    """An arm at one length."""

    tokens: int
    arm: str
    milliseconds: float
    speed: float  # in that of SDPA
    megabytes: float | None
    pooled: float | None  # cosine
    token: float | None
    bound: float | None  # share of the speed without attention that is reached


def arms(learned: Learned) -> dict[str, Attention]:
    """What is plugged in."""

    def routed(share: float, tail: bool, keys: float = 4.0) -> Pattern:
        pattern = Routed("budget", share, tail=tail, keys_per_cluster=keys)
        around: dict[str, int] = {} if tail else {"window": 11, "global_tokens": 1}  # a tail needs neither
        return Configuration("routed", pattern, **around).build(learned)

    def refined(level: float, keys: float = 32.0) -> Pattern:
        return Refined(level, keys_per_cluster=keys, **learned.artefacts)

    found: dict[str, Attention] = {BOUND: lambda q, k, v, valid, layer: v}
    found["window 257"] = Bucketed(Window(257), SOFTMAX)
    found["routed, 10% of the keys"] = Bucketed(routed(0.1, tail=False), SOFTMAX)
    found["routed, 2.5% and the tail"] = Bucketed(routed(0.025, tail=True, keys=16.0), SOFTMAX)
    for level, keys in ((5.0, 32.0), (2.5, 32.0), (1.0, 32.0), (2.5, 64.0)):  # fewer clusters, fewer entries
        found[f"refined, level {level}, {keys:.0f} keys a cluster"] = Bucketed(refined(level, keys), SOFTMAX)
    found[AUTO] = Auto(refined(2.5), SOFTMAX)
    return found


def run(model: Any, ids: Tensor) -> Tensor:
    """Token states ``(1, N, E)``."""
    states: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return states


def cosines(model: Any, documents: list[Tensor], reference: list[Tensor]) -> tuple[float, float]:
    """Of pooled documents and of token states, means over the documents."""
    both = []
    for ids, dense in zip(documents, reference, strict=True):
        states, valid = run(model, ids), torch.ones(ids.shape, dtype=torch.bool)
        of_document = token_cosines(pooled(states, valid), pooled(dense, valid)).mean()
        both.append((of_document, token_cosines(states, dense).mean()))
    return tuple(torch.tensor(both).double().mean(0).tolist())  # type: ignore[return-value]


def compare(tokens: int, others: dict[str, Any], documents: list[Tensor], rounds: int) -> list[Row]:
    """One length: ``others`` are the arms' models, the baseline first."""
    first = documents[0]
    calls: dict[str, Callable[[], object]] = {name: lambda m=model: run(m, first) for name, model in others.items()}
    measured = measure(calls, rounds)
    dense = [run(others[BASELINE], ids) for ids in documents]
    rows = []
    for name, model in others.items():
        same = name in (BASELINE, BOUND)
        quality = (None, None) if same else cosines(model, documents, dense)
        rows.append(row(tokens, name, measured, quality))
    report(tokens, rows, len(documents), rounds)
    return rows


def row(tokens: int, name: str, measured: dict[str, Measured], quality: tuple[float | None, float | None]) -> Row:
    """What was measured of an arm."""
    own, baseline = measured[name], measured[BASELINE]
    speed, peak = own.faster_than(baseline), own.peak
    bound = speed / measured[BOUND].faster_than(baseline) if BOUND in measured else None
    return Row(tokens, name, 1e3 * own.median, speed, None if peak is None else peak / 2**20, *quality, bound)


def report(tokens: int, rows: list[Row], documents: int, rounds: int) -> None:
    """A table in Markdown."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    print(f"\n### Whole encoder: {tokens:,} tokens, {documents} documents, {rounds} rounds\n")
    print("| attention | median ms | SDPA ÷ this | peak MB | pooled cosine | token cosine | of the bound |")
    print("|---|---|---|---|---|---|---|")
    for each in rows:
        quality = f"{cell(each.pooled, '.4f')} | {cell(each.token, '.4f')} | {cell(each.bound, '.2f')}"
        speed = f"{each.milliseconds:,.1f} | {each.speed:.2f} | {cell(each.megabytes, ',.0f')}"
        print(f"| {each.arm} | {speed} | {quality} |", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = recorded.arguments(__doc__, "BERT or RoBERTa encoder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--short", type=int, nargs="*", default=[128, 256, 512, 1024], help="auto alone, against SDPA")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", nargs="*", default=[""], help="only those whose names contain one of these")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    given = parser.parse_args()
    model, tokenizer = recorded.lengthened(given.model, max(given.tokens))
    training = recorded.texts(given.train, tokenizer, recorded.LEARNED, recorded.TRAINING)
    every = arms(recorded.learned(recorded.samples(model, training)))
    asked = (BOUND, AUTO, *given.arms)
    attentions = {name: each for name, each in every.items() if any(word in name for word in asked)}
    print(machine())
    rows: list[Row] = []
    with ExitStack() as stack:
        others = {BASELINE: model}
        for name, attention in attentions.items():
            others[name] = recorded.twin(model)
            stack.enter_context(models.plugged(others[name], attention))
        for tokens in given.short:
            documents = recorded.texts(given.test, tokenizer, tokens, given.documents)
            pair = {name: others[name] for name in (BASELINE, AUTO)}
            rows += compare(tokens, pair, documents, 10 * given.rounds)
        for tokens in given.tokens:
            documents = recorded.texts(given.test, tokenizer, tokens, given.documents)
            rows += compare(tokens, others, documents, given.rounds)
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in rows], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
