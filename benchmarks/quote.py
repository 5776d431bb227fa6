"""The README's figures of speed, written anew from ``benchmarks/results.md``, so that no figure in it is typed by hand.

python benchmarks/quote.py
"""

from __future__ import annotations

import re
import textwrap
from itertools import dropwhile, takewhile
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "### Speed", "The hinge per pair beats"
NAMES = [
    *("SDPA softmax", "dense entmax", "quantize, 1 round", "quantize, 4 rounds of 16", "kmeans, top 1"),
    *("routed, 64 keys", "routed, 64 keys, in torch"),
]
LENGTHS = ["2,048", "4,096", "8,192", "16,384", "32,768"]


def rows(results: str, title: str) -> dict[str, list[str]]:
    """The cells of each row of the table below ``### title``, by the first one."""
    return table(re.split(r"\n### ", results.split(f"### {title}", 1)[1])[0])


def table(text: str) -> dict[str, list[str]]:
    """The cells of each row of the first table of ``text``, by the first one."""
    lines = dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in takewhile(lambda x: x.startswith("|"), lines)
    ]
    return {first: rest for first, *rest in cells[2:]}


def learning(results: str) -> str:
    """What learning and measuring cost, in a paragraph."""
    project, cluster, record = (
        table(results[results.index(f"| {head}") :]) for head in ("projections, ", "k-means, 144", "32 blocks of 512")
    )
    large = found(r"12 layers × 12 heads × 512 tokens, 50 samples, 3 epochs: (\d+) s", results)
    scored = found(r"score: 100 configurations, 50 samples of [^:]*: (\d+ s, \d+ MB)", results)
    ours, theirs = project["sparsefinder"], project["published"]
    projected, clustered = (float(each["sparsefinder"][0].replace(",", "")) / 1000 for each in (project, cluster))
    sentences = [
        "On the same machine, by the same command: projections of 4 layers × 4 heads from 50 samples of 256 tokens in 3 epochs",
        f"take {projected:.2f} s, {ours[2]} times as fast as the published method in our own words, with a held-out recall of",
        f"{ours[3]} against {theirs[3]} (the published program: 10.8 s for one layer, on another machine);",
        f"12 layers × 12 heads × 512 tokens take {large} s.",
        f"k-means of 144 heads × 51,200 points takes {clustered:.1f} s, with {cluster['sparsefinder'][3]} of scikit-learn's",
        "inertia.",
        f"`score` measures a hundred configurations on 50 samples of RoBERTa-base shape ({scored}).",
        f"`extract` runs at {record['extract'][2]} of the speed of the forward pass alone, `evaluate` at",
        f"{record['evaluate'][2]} of it.",
    ]
    return "### Learning and measuring\n\n" + textwrap.fill(" ".join(sentences), 130) + "\n\n"


def found(what: str, text: str) -> str:
    """The first group of a pattern that must be there."""
    match = re.search(what, text)
    if match is None:
        raise SystemExit(f"results.md has no line like {what}: run make bench")
    return match[1]


def section(results: str) -> str:
    """Tables in Markdown."""
    machine = re.search(r".*threads, torch.*", results)
    forward = {length: rows(results, f"{length} tokens, forward, ") for length in LENGTHS}
    both = {length: rows(results, f"{length} tokens, forward and backward") for length in LENGTHS[:2]}
    heads = [f"{length} tokens" for length in LENGTHS] + [f"{length}, and backward" for length in both]
    lines = [
        f"{BEGIN}\n",
        f"`make bench` ({machine.group() if machine else ''}); `benchmarks/results.md` is what it",
        "printed, [`docs/explanation/performance.md`](docs/explanation/performance.md) tells what was tried.",
        "Bucketed entmax attention, predictor inside, beside torch's dense",
        "softmax attention (SDPA): how many times as fast, and the median time. 12 heads of 64, buckets of 64",
        "tokens, a window of 11, one global token; the bucketed ones in C++ but for the last row, which multiplies the",
        "filling of its blocks too. Growth: the exponent of the time",
        f"from {LENGTHS[1]} to {LENGTHS[-1]} tokens.\n",
        f"| attention | {' | '.join(heads)} | pairs multiplied, of a query at 8,192 | MB at 16,384 | growth |",
        f"|---{'|---' * (len(heads) + 3)}|",
    ]
    growth = dict(re.findall(r"^- (.*): ([\d.]+)$", results, re.MULTILINE))
    for name in NAMES:
        times = [
            f"{found[name][2]} ({found[name][0]} ms)" if name in found else ""
            for found in (*forward.values(), *both.values())
        ]
        more = forward["8,192"][name][4], forward["16,384"][name][3], growth.get(name, "")
        lines.append(f"| {name} | {' | '.join((*times, *more))} |")
    lines += [
        "\nThe normalizer: α-entmax (α = 1.5) in the speed of the `entmax` package, and the time of dense attention",
        "with it in that of dense softmax attention, forward.\n",
        "| rows of | forward | forward and backward | peak MB, ours and the package's | dense attention |",
        "|---|---|---|---|---|",
    ]
    for length in ("512", "2,048"):
        alone = rows(results, f"6,144 rows of {length}, forward, ")
        trained = rows(results, f"6,144 rows of {length}, forward and backward")["entmax15"]
        dense = float(rows(results, f"Dense attention over {length} tokens, forward, ")["entmax15"][2])
        ours, package = alone["entmax15"], alone["entmax15 of the package"]
        lines.append(f"| {length} | {ours[2]} × | {trained[2]} × | {ours[4]} and {package[4]} | {1 / dense:.2f} |")
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    readme = HERE.parent / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    after = rest[rest.index(END) :]
    results = (HERE / "results.md").read_text(encoding="utf-8")
    readme.write_text(before + section(results) + learning(results) + after, encoding="utf-8")
