"""The README's section on speed, written anew from ``benchmarks/results.md``, so that no figure in it is typed by hand.

python benchmarks/quote.py
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "### Speed", "### Learning and measuring"
NAMES = [
    *("SDPA softmax", "dense entmax", "quantize, 1 round", "quantize, 4 rounds of 16", "kmeans, top 1"),
    *("routed, 64 keys", "routed, 64 keys, in torch"),
]
LENGTHS = ["2,048", "4,096", "8,192", "16,384", "32,768"]


def rows(results: str, title: str) -> dict[str, list[str]]:
    """The cells of each row of the table below ``### title``, by the first one."""
    part = re.split(r"\n### ", results.split(f"### {title}", 1)[1])[0]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")
    ]
    return {first: rest for first, *rest in cells[2:]}


def section(results: str) -> str:
    """Tables in Markdown."""
    machine = re.search(r".*threads, torch.*", results)
    forward = {length: rows(results, f"{length} tokens, forward, ") for length in LENGTHS}
    both = {length: rows(results, f"{length} tokens, forward and backward") for length in LENGTHS[:2]}
    heads = [f"{length} tokens" for length in LENGTHS] + [f"{length}, and backward" for length in both]
    lines = [
        f"{BEGIN}\n",
        f"`make bench` ({machine.group() if machine else ''}); `benchmarks/results.md` is what it",
        "printed, `docs/performance.md` tells what was tried. Bucketed entmax attention, predictor inside, beside torch's dense",
        "softmax attention (SDPA): how many times as fast, and the median time. 12 heads of 64, buckets of 64",
        "tokens, a window of 11, one global token; in C++ but for the last row. Growth: the exponent of the time",
        f"from {LENGTHS[1]} to {LENGTHS[-1]} tokens.\n",
        f"| attention | {' | '.join(heads)} | pairs of a query at 8,192 | MB at 16,384 | growth |",
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
    readme.write_text(before + section((HERE / "results.md").read_text(encoding="utf-8")) + after, encoding="utf-8")
