"""Give a checkpoint a predicted sparse attention, learned from a file of texts, and save both with a certificate.

    python scripts/sparsify.py MODEL --texts FILE --density 0.1 --out FOLDER

The folder is loaded by sparsefinder.load(FOLDER), or by AutoModel after `import sparsefinder`. Nothing is saved where the
certificate fails, unless --even_if_it_fails is given.
"""

import argparse
import logging
import sys

from sparsefinder.commandline.commands import Parser, in_one_line


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", help="folder or hub name of the model")
    add("--texts", required=True, help="file of plain text like those that the model will read, a folder or a pattern")
    add("--out", required=True, help="folder to save the result in; it must not exist")
    add(
        "--density", type=float, help="share of the pairs that all heads together take; 0.1 where nothing else is given"
    )
    add("--recall", type=float, help="least share of the gold edges (softmax: of the probability) in each head")
    add("--loss_tolerance", type=float, help="most that 1 − the cosine of the pooled output to the dense one may be")
    add("--pattern", help="a file of conf/pattern; default: refined where the model has softmax, else routed")
    add("--window", type=int, help="odd number of tokens around each query that are always attended")
    add("--global_tokens", type=int, default=0, help="first tokens that see all and are seen by all")
    add("--length", type=int, help="tokens of the longest text of the certificate; default: what the model reads")
    add("--seed", type=int, default=0)
    add("--even_if_it_fails", action="store_true", help="save although the certificate fails; it says where")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Learn, measure, save and report. Raises `UserError` for wrong values."""
    from sparsefinder.sparse_model.sparsifying import sparsify

    given = vars(arguments)
    if all(given[name] is None for name in ("density", "recall", "loss_tolerance")):
        given["density"] = 0.1
    certificate = sparsify(given.pop("model"), given.pop("texts"), given["out"], **_without(given, "out"))
    for check in certificate.checks:
        print(f"{'passed' if check.passed else 'FAILED'}: {check.name}: {check.measured:.3g} {check.note}")
    print(f"{arguments.out}: load it with sparsefinder.load({arguments.out!r})")


def _without(given: dict[str, object], name: str) -> dict[str, object]:
    return {key: value for key, value in given.items() if key != name}


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when all went well, 2 for wrong input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return in_one_line(lambda: run(parse(arguments)), "nothing is half written; run the same command again")


def command() -> None:
    """The console command ``sparsefinder-sparsify``."""
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
