"""What an attention errs at equal time: every method that has a fast form, swept, in a whole encoder.

    python benchmarks/equal_time.py --model FOLDER --train valid.txt --test test.txt     # half an hour on two cores
    python benchmarks/equal_time.py --model FOLDER --train A --test B --tokens 2048 --documents 2 --methods window refined

All layers are replaced, softmax throughout, batch 1, float32, prediction inside. Every document is read by the model's own SDPA
and then by each arm in turn: the time is the median over documents of the arm's in that of SDPA, the error is ``|s − s'| / |s|``
of the last layer's states ``s``, and the cosines are those of pooled documents and of tokens; means over the documents. What
took more than SDPA on the first document, which is not counted, is named and left.

Whose an arm is: *ours*; *others*, as published (with the window and the global token that ours have too); or *theirs, our
tail*: their choice, and what they do not choose as entries of the tail, which is no published method (multipole's own tail is).
An arm is beaten where another's takes no longer and errs less. *Bounds*, the keys of largest true score and nothing else, are not
timed: what any choice of single keys without a tail can reach. Learned from texts of 512 tokens of ``--train``: 24 as in
`encoder.py`, and for k-means and quantization projections to 4 numbers, as published, and centroids from 8 of them.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import recorded
import torch
from encoder import SOFTMAX, run
from measuring import keep_freed_memory, machine
from torch import Tensor

from sparsefinder import models
from sparsefinder.attention import Bucketed
from sparsefinder.evaluation.tasks.embedding import pooled, token_cosines
from sparsefinder.executors.local_sparse_global.attention import LSGAttention
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.graphs import Attention, Pattern
from sparsefinder.kmeans_centroids import ClusterSettings
from sparsefinder.patterns.bigbird import BigBird
from sparsefinder.patterns.block_pool import BlockPool
from sparsefinder.patterns.clustered import Clustered
from sparsefinder.patterns.kmeans import KMeans
from sparsefinder.patterns.longformer import Longformer
from sparsefinder.patterns.multipole import Multipole
from sparsefinder.patterns.pages import Pages
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.quest import Quest
from sparsefinder.patterns.refined import Refined
from sparsefinder.patterns.reformer import Reformer
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.routing import Routing
from sparsefinder.patterns.window import Window
from sparsefinder.patterns.xattention import XAttention
from sparsefinder.predictors.fit_centroids import fit_centroids
from sparsefinder.quantization import ProjectSettings, train_projections
from sparsefinder.storage.samples import Samples

OURS, OTHERS, MIXED, BOUNDS = "ours", "others", "theirs, our tail", "bounds"
CLUSTERS = (16, 64)  # of k-means
PROJECTED = ("kmeans", "quantize")  # the methods that learn projections
TEXTS = 8  # that they learn from
NEAR = {"window": 11, "global_tokens": 1}  # what is united with a choice that has no tail
Clock = Callable[[], float]


@dataclass(frozen=True, eq=False)
class Arm:
    """An attention and its name."""

    method: str
    setting: str
    whose: str
    attention: Attention


@dataclass(frozen=True)
class Point:
    """What was measured of an arm at one length."""

    tokens: int
    method: str
    setting: str
    whose: str
    time: float  # in that of SDPA; NaN where there is none
    error: float
    pooled: float  # cosine
    token: float  # cosine

    def beats(self, other: Point) -> bool:
        """Whether this one takes no longer and errs less."""
        return self.time <= other.time and self.error < other.error


def sweep(learned: Learned, centroids: dict[int, Any]) -> Iterator[Arm]:
    """All arms, every method at a few settings; those of projections only where there are centroids."""

    def arm(whose: str, setting: str, pattern: Pattern, of: Learned = learned, **around: int) -> Arm:
        name = type(pattern).__name__
        return Arm(name, setting, whose, Bucketed(Configuration(name, pattern, **around).build(of), SOFTMAX))

    def both(setting: str, make: Callable[[bool], Pattern], of: Learned = learned) -> Iterator[Arm]:
        yield arm(OTHERS, setting, make(False), of, **NEAR)
        yield arm(MIXED, f"{setting}, tail", make(True), of)

    for share in (0.025, 0.05, 0.1, 0.2):
        yield arm(OURS, f"{share:.1%}", Routed("budget", share), **NEAR)
    for share in (0.0125, 0.025, 0.05, 0.1):
        yield arm(OURS, f"{share:.2%}, tail", Routed("budget", share, tail=True, keys_per_cluster=16.0))
    for level, keys in ((10.0, 32.0), (5.0, 32.0), (2.5, 32.0), (1.0, 32.0), (0.5, 32.0), (5.0, 64.0), (2.5, 64.0)):
        yield arm(OURS, f"level {level}, {keys:.0f} keys", Refined(level, alpha=1.0, keys_per_cluster=keys))
    for width in (65, 129, 257, 513, 1025):
        yield arm(OTHERS, f"{width}", Window(width))
        yield arm(OTHERS, f"{width}, a global token", Longformer(width, dilated_heads=0))
    for block in (16, 32, 64):
        yield arm(OTHERS, f"blocks of {block}", BigBird(block))
    for kind in ("norm", "pooling", "stride"):
        for block in (32, 64, 128):
            lsg = LSGAttention(
                sparsity_type=kind, block_size=block, sparse_block_size=block, sparsity_factor=4, num_global_tokens=1
            )
            yield Arm("LSG", f"{kind}, blocks of {block}", OTHERS, lsg)
    for count, found in centroids.items():
        of = Learned({"projections": learned.artefacts["projections"], "centroids": found})
        for top in (1, 2, 4):
            yield arm(OTHERS, f"{top} of {count}", KMeans(top), of, **NEAR)
        yield arm(MIXED, f"1 of {count}, tail", KMeans(1, tail=True), of)
    for size in (16, 64) if centroids else ():
        yield arm(OTHERS, f"bins of {size}", Quantize(size), **NEAR)
    for size in (16, 32):
        for level in (-0.3, 0.0, 0.5):
            yield from both(f"level {level}, {size} keys", lambda tail, x=level, n=size: Pages(x, n, tail=tail))
        for share in (0.05, 0.1, 0.2):
            yield from both(f"{share:.0%}, {size} keys", lambda tail, x=share, n=size: Quest(x, n, tail=tail))
            yield from both(f"{share:.0%}, {size} tokens", lambda tail, x=share, n=size: BlockPool(x, n, tail=tail))
    for p in (0.5, 0.7, 0.9):
        yield from both(f"{p:.0%}, stride 8", lambda tail, x=p: XAttention(x, stride=8, tiles=4, tail=tail))
    for share, count in ((0.025, 64), (0.05, 64), (0.1, 64), (0.05, 128)):
        setting = f"{share:.1%} of {count} clusters, its tail"
        yield arm(OTHERS, setting, Multipole(share, n_clusters=count, iterations=1))
    for share in (0.025, 0.05, 0.1):
        yield arm(OTHERS, f"{share:.1%}, 100 clusters", Clustered(share, n_clusters=100), **NEAR)
    for rounds in (1, 2, 4):
        yield arm(OTHERS, f"{rounds} rounds", Reformer(rounds), **NEAR)
    yield arm(OTHERS, "5%, 32 centroids", Routing(0.05, iterations=1), **NEAR)
    for share in (0.01, 0.02, 0.05, 0.1):
        yield Arm("OracleTopK", f"{share:.0%}", BOUNDS, largest(share))


def largest(share: float) -> Attention:
    """Softmax over the keys of largest true score, `OracleTopK`, a head at a time so that it fits into memory."""

    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        heads = []
        for query, key, value in zip(q[0], k[0], v[0], strict=True):
            best = (query @ key.mT / math.sqrt(q.shape[-1])).topk(math.ceil(share * len(key)), dim=-1)
            heads.append(torch.einsum("nk,nkd->nd", best.values.softmax(-1), value[best.indices]))
        return torch.stack(heads)[None]

    return attend


def learn(samples: Samples, projected: bool) -> tuple[Learned, dict[int, Any]]:
    """The closed form and its clusters for ours; where it is asked for, projections and centroids for the published ones."""
    ours = recorded.learned(samples)
    if not projected:
        return ours, {}
    samples = samples.part(0, TEXTS)
    projections = train_projections(samples, samples.part(0, 1), ProjectSettings(eval_every=0)).projections
    centroids = {count: fit_centroids(samples, projections, ClusterSettings(n_clusters=count)) for count in CLUSTERS}
    return Learned({**ours.artefacts, "projections": projections}), centroids


def judged(states: Tensor, dense: Tensor) -> tuple[float, float, float]:
    """Relative error, cosine of the pooled document, mean cosine of its tokens."""
    valid = torch.ones(dense.shape[:2], dtype=torch.bool)
    of_document = token_cosines(pooled(states, valid), pooled(dense, valid)).mean()
    return float((states - dense).norm() / dense.norm()), float(of_document), float(token_cosines(states, dense).mean())


def measured(
    tokens: int, model: Any, arms: dict[Arm, Any], documents: Sequence[Tensor], clock: Clock
) -> tuple[list[Point], list[str]]:
    """One length: each arm beside SDPA on every document. The first one warms up, and names those that are no faster.

    A quarter of it is read before: whoever takes a third of SDPA's time for that, is no faster on the whole.
    """

    def timed(of: Any, ids: Tensor) -> tuple[float, Tensor]:
        start = clock()
        states = run(of, ids)
        return clock() - start, states

    run(model, documents[0])
    limit, slow, kept = timed(model, documents[0])[0], [], {}
    quarter = documents[0][:, : tokens // 4]
    for arm, of in arms.items():
        if arm.whose == BOUNDS:
            kept[arm] = of
            continue
        run(of, quarter)  # compiles
        if 3 * timed(of, quarter)[0] < limit and timed(of, documents[0])[0] < limit:
            kept[arm] = of
        else:
            slow.append(f"{arm.method} ({arm.setting})")
    found: dict[Arm, list[tuple[float, ...]]] = {arm: [] for arm in kept}
    for ids in documents[1:]:
        seconds, dense = timed(model, ids)
        for arm, of in kept.items():
            own, states = timed(of, ids)
            found[arm].append((math.nan if arm.whose == BOUNDS else own / seconds, *judged(states, dense)))
    points = [
        Point(tokens, arm.method, arm.setting, arm.whose, statistics.median(times), *map(statistics.fmean, errors))
        for arm, rows in found.items()
        for times, *errors in [list(zip(*rows, strict=True))]
    ]
    return points, slow


def report(title: str, points: list[Point], slow: list[str]) -> None:
    """All of them by their time, which of them nothing beats, and what beats ours."""
    print(f"\n### Equal time: {title}\n")
    print("| attention | whose | time ÷ SDPA | error | pooled cosine | token cosine | beaten by |")
    print("|---|---|---|---|---|---|---|")
    for point in sorted(points, key=lambda each: (math.isnan(each.time), each.time)):
        better = [other for other in points if other.beats(point)]
        best = min(better, key=lambda each: each.error, default=None)
        seconds = "–" if math.isnan(point.time) else f"{point.time:.3f}"
        figures = f"{seconds} | {point.error:.4f} | {point.pooled:.4f} | {point.token:.4f}"
        by = f"{best.method} ({best.setting})" if best else "" if point.whose == BOUNDS else "**nothing**"
        print(f"| {point.method} ({point.setting}) | {point.whose} | {figures} | {by} |")
    print()
    ours = [point for point in points if point.whose == OURS]
    for whose in (OTHERS, MIXED):
        others = [point for point in points if point.whose == whose]
        beaten = [f"{point.method} ({point.setting})" for point in ours if any(each.beats(point) for each in others)]
        rivals = [f"{each.method} ({each.setting})" for each in others if not any(p.beats(each) for p in ours)]
        print(f"- Of {len(ours)} arms of ours, beaten by {whose}: {'; '.join(beaten) or 'none'}.")
        print(f"- Of {len(others)} arms of {whose}, not beaten by ours: {'; '.join(rivals) or 'none'}.")
    print(f"- No faster than SDPA: {'; '.join(slow) or 'none'}.", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = recorded.arguments(__doc__, "BERT or RoBERTa encoder")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument("--documents", type=int, default=4, help="counted, after one that warms up")
    parser.add_argument("--methods", nargs="*", help="only these, by the names of their classes, in any case")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, where the machine does other work too")
    parser.add_argument("--json", type=Path, help="write the points here too")
    given = parser.parse_args()
    model, tokenizer = recorded.lengthened(given.model, max(given.tokens))
    wanted = None if given.methods is None else {name.lower() for name in given.methods}
    with torch.inference_mode(False):
        samples = recorded.samples(model, recorded.texts(given.train, tokenizer, recorded.LEARNED, recorded.TRAINING))
        arms = list(sweep(*learn(samples, wanted is None or not wanted.isdisjoint(PROJECTED))))
    clock = time.process_time if given.cpu_time else time.perf_counter
    keep_freed_memory()
    print(f"{machine()}\n{'seconds of the processor' if given.cpu_time else 'wall time'}")
    points: list[Point] = []
    with ExitStack() as stack:
        plugged = {}
        for arm in arms:
            if wanted is None or arm.method.lower() in wanted:
                plugged[arm] = recorded.twin(model)
                stack.enter_context(models.plugged(plugged[arm], arm.attention))
        for tokens in given.tokens:
            documents = recorded.texts(given.test, tokenizer, tokens, given.documents + 1)
            found, slow = measured(tokens, model, plugged, documents, clock)
            report(f"{given.model.name}, {tokens:,} tokens, {len(documents) - 1} documents", found, slow)
            points += found
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in points], indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
