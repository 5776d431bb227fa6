"""The figures of speed in the documents, written anew from what the benchmarks printed, so that no figure in it is typed by hand.

    python benchmarks/quote.py

Reads ``benchmarks/results.md`` (`make bench`), ``benchmarks/real.md`` (`make bench-real`), what `front_door.py` printed, and in
``benchmarks/kept_aside.md`` what `budgets.py`, `gold_density.py` and `equal_time.py` printed one after the other. Replaced is
what stands between ``<!-- quoted: NAME -->`` and ``<!-- end -->`` in the pages of `PAGES`. Of what was not measured the text says
so.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable
from functools import partial
from itertools import dropwhile, takewhile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
_NAMES = ("explanation/equal_cost", "explanation/measured", "explanation/performance", "how-to/long_documents")
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in _NAMES))
QUOTED = re.compile(r"(<!-- quoted: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
BASELINE = "SDPA softmax"


class NotMeasuredError(Exception):
    """A table or a line that a quotation needs is not there."""


# ---- reading ----


def sections(results: str, title: str) -> dict[str, str]:
    """Every section whose heading begins with ``title``: the length in its heading → its text."""
    parts = re.split(r"^### ", results, flags=re.MULTILINE)
    found = {}
    for part in parts:
        match = re.match(rf"{re.escape(title)}: ([\d,]+) tokens", part)
        if match:
            found[match[1]] = part
    if not found:
        raise NotMeasuredError(title)
    return found


def rows(results: str, title: str) -> dict[str, list[str]]:
    """The cells of each row of the table below ``### title``, by the first one."""
    if f"### {title}" not in results:
        raise NotMeasuredError(title)
    return table(re.split(r"\n### ", results.split(f"### {title}", 1)[1])[0])


def table(text: str) -> dict[str, list[str]]:
    """The cells of each row of the first table of ``text``, by the first one."""
    lines = dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in takewhile(lambda x: x.startswith("|"), lines)
    ]
    return {first: rest for first, *rest in cells[2:]}


def found(what: str, text: str) -> str:
    """The first group of a pattern that must be there."""
    match = re.search(what, text, re.MULTILINE)
    if match is None:
        raise NotMeasuredError(what)
    return match[1]


def lines_of(heads: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    heads = list(heads)
    written = [f"| {' | '.join(cells)} |" for cells in (heads, *body)]
    return "\n".join((written[0], f"|{'---|' * len(heads)}", *written[1:]))


def machine(results: str) -> str:
    """Processor, threads and versions."""
    return found(r"(.*threads, torch.*)", results)


# ---- what is quoted ----


def encoder(results: str) -> str:
    """A whole encoder: speed and cosines, an arm a row and a length a column."""
    of_length = {tokens: table(text) for tokens, text in sections(results, "Whole encoder").items()}
    whole = {tokens: each for tokens, each in of_length.items() if "no attention" in each}
    longest = list(whole)[-1]

    def cell(row: list[str]) -> str:
        return f"{row[1]} ({row[3]}, {row[4]})" if row[3] else row[1]

    body = [
        [name, *(cell(each[name]) for each in whole.values()), last[2]]
        for name, last in whole[longest].items()
        if all(name in each for each in whole.values())
    ]
    text = lines_of(["attention", *(f"{tokens} tokens" for tokens in whole), f"MB at {longest}"], body)
    parts = re.findall(r"### Whole encoder: ([\d,]+) tokens[^\n]*\n\n(.*?)(?=\n###|\Z)", results, re.DOTALL)
    alone = [(tokens, table(part)) for tokens, part in parts if "no attention" not in part]
    if alone:
        text += (
            "\n\n`auto` beside SDPA: "
            + ", ".join(f"{each['auto'][1]} at {tokens} tokens" for tokens, each in alone)
            + "."
        )
    machines = re.findall(r".*threads, torch.*", results.partition("### Whole encoder")[0])
    return f"{machines[-1]}.\n\n{text}"


def front_door(results: str) -> str:
    """What `sparsefinder.attach` does to an encoder: speed with `auto`, cosine without it, a length a column."""
    cosines = rows(results, "Front door: quality")
    times = rows(results, "Front door: time")
    body = [
        ["speed with `auto`", *(f"{1 / float(row[1]):.2f}" for row in times.values())],
        ["pooled cosine with `auto=False`", *(cosines[n][1] if n in cosines else "" for n in times)],
    ]
    learned = found(r"^(fit: .*)$", results), found(r"^(the block of the README: .*)$", results)
    before = results.partition("### Front door")[0]
    machines = re.findall(r".*threads, torch.*", before)
    return f"{machines[-1]}; {'; '.join(learned)}.\n\n{lines_of(['tokens', *times], body)}"


def below(title: str, results: str) -> str:
    """Whatever stands below the headings that begin with a title, what they say beside it in front."""
    ends = r"(?=\n### |\n[^\n]*threads, torch|\Z)"
    parts = re.findall(rf"^### {re.escape(title)}([^\n]*)\n\n(.*?){ends}", results, re.DOTALL | re.MULTILINE)
    if not parts:
        raise NotMeasuredError(title)
    return "\n\n".join(f"{heading.strip(', ')}:\n\n{text.strip()}" for heading, text in parts)


def equal_time(results: str) -> str:
    """What nothing beats, all of ours and the bounds; what beats ours is said below."""
    lines = below("Equal time: e5small", results).splitlines()
    told = ("**nothing** |", "| ours |", "| bounds |")
    head = ("| attention", "|---")
    return "\n".join(
        line for line in lines if line[:1] != "|" or line.startswith(head) or any(each in line for each in told)
    )


def headline(results: str) -> str:
    """The line of the README: `auto` at the longest two lengths and at the shortest, with what it costs."""
    of_length = {tokens: table(text)["auto"] for tokens, text in sections(results, "Whole encoder").items()}
    if len(of_length) < 3:
        raise NotMeasuredError("Whole encoder, at three lengths")
    shortest, *_, long, longest = of_length
    said = (
        f"- **{of_length[long][1]} × at {long} tokens and {of_length[longest][1]} × at {longest}** the speed of a whole sentence "
        f"encoder with torch's SDPA, nobody having trained it for that, with {of_length[long][3]} and {of_length[longest][3]} of "
        f"the cosine of its pooled embeddings; {of_length[shortest][1]} × at {shortest} tokens (`make bench-real`, two cores "
        "of a CPU)."
    )
    return textwrap.fill(said, 150, subsequent_indent="  ", break_on_hyphens=False)


def attention_alone(results: str) -> str:
    """Attention of one layer on recorded vectors: speed, recall and error."""
    of_length = {tokens: table(text) for tokens, text in sections(results, "Recorded").items()}

    def cell(row: list[str]) -> str:
        quality = ", ".join(part for part in (row[4], row[5]) if part)
        return f"{row[2]} ({quality})" if quality else row[2]

    names = list(of_length[list(of_length)[-1]])
    body = [[name, *(cell(each[name]) if name in each else "" for each in of_length.values())] for name in names]
    return lines_of(["attention", *(f"{tokens} tokens" for tokens in of_length)], body)


def shape(results: str) -> str:
    """A whole layer of RoBERTa-base."""
    of_length = {tokens: table(text) for tokens, text in sections(results, "A layer of RoBERTa-base").items()}
    body = [
        [name, *(f"{row[name][2]} ({row[name][6]}; {row[name][5] or '–'})" for row in of_length.values())]
        for name in next(iter(of_length.values()))
    ]
    return lines_of(["attention", *(f"{tokens} tokens" for tokens in of_length)], body)


def growth(results: str) -> str:
    """The exponents of the time at constant recall, or at a constant error of the output."""
    lines = re.findall(r"^- growth, (.*) tokens, (.*): ([\d.]+)$", results, re.MULTILINE)
    if not lines:
        raise NotMeasuredError("- growth")
    return f"Exponents from {lines[0][0]} tokens: {'; '.join(f'{exponent} ({what})' for _, what, exponent in lines)}."


def dense(results: str) -> str:
    """Exact entmax: how many times as fast as SDPA."""
    pattern = r"^### Exact entmax, (.*?): ([\d,]+) tokens, (forward(?: and backward)?), \d+ rounds$"
    headings = re.findall(pattern, results, re.MULTILINE)
    if not headings:
        raise NotMeasuredError("Exact entmax")
    columns = list(dict.fromkeys((tokens, way) for _, tokens, way in headings))
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for title, tokens, way in headings:
        text = rows(results, f"Exact entmax, {title}: {tokens} tokens, {way}, ")
        cells.setdefault(title, {})[tokens, way] = text["exact entmax"][2]
    heads = [f"{tokens}{', and backward' if way != 'forward' else ''}" for tokens, way in columns]
    body = [[title, *(own.get(column, "") for column in columns)] for title, own in cells.items()]
    return lines_of(["tokens", *heads], body)


def normalizer(results: str) -> str:
    """The normalizer itself."""
    body = []
    for length in ("512", "2,048"):
        alone = rows(results, f"6,144 rows of {length}, forward, ")
        trained = rows(results, f"6,144 rows of {length}, forward and backward")["entmax15"]
        of_dense = float(rows(results, f"Dense attention over {length} tokens, forward, ")["entmax15"][2])
        ours, package = alone["entmax15"], alone["entmax15 of the package"]
        body.append([length, f"{ours[2]} ×", f"{trained[2]} ×", f"{ours[4]} and {package[4]}", f"{1 / of_dense:.2f}"])
    heads = ["rows of", "forward", "forward and backward", "peak MB, ours and the package's", "dense attention"]
    return lines_of(heads, body)


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
    return textwrap.fill(" ".join(sentences), 130)


WRITERS: dict[str, Callable[[str], str]] = {
    "headline": headline,
    "front_door": front_door,
    "encoder": encoder,
    "attention": attention_alone,
    "shape": shape,
    "growth": growth,
    "dense": dense,
    "normalizer": normalizer,
    "learning": learning,
    "cost_kept_aside": partial(below, "Equal cost: e5small"),
    "gold_kept_aside": partial(below, "Gold density: e5small"),
    "time_kept_aside": equal_time,
}


def quoted(name: str, results: str, before: str) -> str:
    """What stands between the marks of ``name``; as before where it was not measured again."""
    try:
        return WRITERS[name](results)
    except NotMeasuredError as what:
        print(f"{name}: what was measured has nothing like “{what}”; left as it is")
        return before


def main() -> None:
    files = (HERE / name for name in ("results.md", "real.md", "front_door.md", "kept_aside.md"))
    results = "\n".join(path.read_text(encoding="utf-8") for path in files if path.exists())
    for page in PAGES:
        text = page.read_text(encoding="utf-8")

        def replaced(match: re.Match[str]) -> str:
            before = match[0][len(match[1]) : -len(match[3])]
            return f"{match[1]}{quoted(match[2], results, before)}{match[3]}"

        page.write_text(QUOTED.sub(replaced, text), encoding="utf-8")


if __name__ == "__main__":
    main()
