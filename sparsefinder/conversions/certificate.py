"""The certificate of a conversion: what was measured, what was allowed; saved with the model, or nothing is saved.

    certificate = Certificate(source="roberta-base", target="longformer", settings={"attention_window": 512})
    certificate = certificate.with_checks(
        at_most("short-input difference to the source", max_difference(source_states, states, valid), 1e-4),
        *check_ids(tokenizer, vocab_size=len(embedding_rows)),
    )
    with staged_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        certificate = certificate.with_checks(at_most("difference after save and reload", ..., 0.0))
        certificate.require()
        write(certificate, folder)

`staged_folder` renames a finished folder into place; when a check fails, nothing is left behind. Nothing here knows a
model family or imports `transformers`.
"""

import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefinder.conversions.positions import PositionAudit
from sparsefinder.errors import UserError

CERTIFICATE_FILE = "conversion.json"
CARD_FILE = "README.md"

Value = bool | int | float | str | None

_SECTION = re.compile(r"<!-- conversion certificate -->.*?<!-- end of conversion certificate -->\n?", re.DOTALL)


@dataclass(frozen=True)
class Check:
    """One statement about a converted model, with the evidence for it."""

    name: str
    """What was looked at, as a phrase."""
    measured: Value
    """What was found."""
    bound: Value
    """What was allowed; None for a figure that is stated without a bound."""
    passed: bool
    note: str = ""
    """How it was measured, or how to read it."""


@dataclass(frozen=True)
class Certificate:
    """What was converted into what, with which settings, and every check with its outcome."""

    source: str
    """Name or path of the source model."""
    target: str
    """Name of the target, as on the command line (`longformer`, `lsg`, …)."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the conversion; values that JSON knows."""
    checks: tuple[Check, ...] = ()
    versions: Mapping[str, str] = field(
        default_factory=lambda: {name: version(name) for name in ("sparsefinder", "torch", "transformers")}
    )
    """Versions that made it."""

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        """True when there is at least one check and none failed."""
        return bool(self.checks) and not self.failed

    def with_checks(self, *checks: Check) -> "Certificate":
        """The same certificate with further checks at its end."""
        return replace(self, checks=(*self.checks, *checks))

    def require(self) -> None:
        """Raise `UserError` naming every failed check with its figures; does nothing when all passed."""
        if not self.checks:
            raise UserError(f"conversion of {self.source} to {self.target} was not checked; nothing was saved")
        if self.failed:
            reasons = "; ".join(_reason(check) for check in self.failed)
            raise UserError(
                f"conversion of {self.source} to {self.target} failed its certificate: {reasons}; nothing was saved"
            )

    def to_json(self) -> str:
        """The certificate as indented JSON; numbers that are not finite become the strings "nan", "inf" and "-inf"."""
        content = {**asdict(self), "passed": self.passed}
        return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """The certificate as a section of a model card: a sentence, the settings and a table of checks."""
        verdict = "passed" if self.passed else "FAILED"
        settings = ", ".join(f"`{name}={value}`" for name, value in self.settings.items()) or "defaults"
        made = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        lines = [
            "## Conversion certificate",
            "",
            f"Converted from `{self.source}` to {self.target} ({settings}) with {made}. "
            f"{len(self.checks)} checks: {verdict}. The same figures are in `{CERTIFICATE_FILE}`.",
            "",
            "| check | measured | bound | passed | note |",
            "|---|---|---|---|---|",
        ]
        for check in self.checks:
            cells = (
                check.name,
                _short(check.measured),
                _short(check.bound),
                "yes" if check.passed else "**no**",
                check.note,
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
        return "\n".join(lines) + "\n"


def at_most(name: str, measured: float, bound: float, note: str = "") -> Check:
    """A check that passes when `measured <= bound`; NaN never passes."""
    return Check(name, measured, bound, bool(measured <= bound), note)


def equals(name: str, measured: Value, expected: Value, note: str = "") -> Check:
    """A check that passes when `measured == expected`."""
    return Check(name, measured, expected, measured == expected, note)


def holds(name: str, passed: bool, note: str = "") -> Check:
    """A check of a statement that is true or not."""
    return Check(name, passed, True, passed, note)


def states(name: str, measured: Value, note: str = "") -> Check:
    """A figure that is recorded and not bounded: an approximation states how far off it is."""
    return Check(name, measured, None, True, note)


def max_difference(expected: Tensor, found: Tensor, valid: Tensor | None = None) -> float:
    """Largest absolute difference of two `(B, N, …)` tensors, over real tokens `valid (B, N)` if given, in float64.

    NaN if either holds one there; infinity if the shapes differ, so that a check of it fails.
    """
    if expected.shape != found.shape:
        return math.inf
    if valid is not None:
        expected, found = expected[valid.bool()], found[valid.bool()]
    if not expected.numel():
        return 0.0
    return float((expected.detach().double().cpu() - found.detach().double().cpu()).abs().max())


def check_finite(name: str, tensors: Iterable[Tensor], note: str = "") -> Check:
    """A check that counts numbers that are not finite and allows none."""
    return equals(name, sum(int((~torch.isfinite(tensor)).sum()) for tensor in tensors), 0, note)


def check_positions(result: PositionAudit, name: str = "position table, rows that differ") -> Check:
    """The outcome of `positions.audit` as a check."""
    first = f"; first wrong rows {list(result.wrong_rows[:5])}" if result.wrong_rows else ""
    note = f"{result.rows_checked} rows compared one by one, largest difference {result.max_difference:.3g}{first}"
    return equals(name, len(result.wrong_rows), 0, note)


def check_ids(tokenizer: Any, vocab_size: int) -> tuple[Check, ...]:
    """Checks that every id the tokenizer can give has a row among the `vocab_size` word embeddings.

    One check for the largest id of the vocabulary and one for each special token that is set (mask, pad, …): the
    distilled BART checkpoints have a mask id that equals the vocabulary size, and fail only once a text is masked.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    checks = [at_most("largest token id", largest, vocab_size - 1, "last row of the word embeddings")]
    for role in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token_id = getattr(tokenizer, f"{role}_id", None)
        if token_id is not None:
            inside = 0 <= token_id < vocab_size
            checks.append(Check(f"id of {role}", token_id, vocab_size - 1, inside, repr(getattr(tokenizer, role))))
    return tuple(checks)


def check_lengths(tokenizer: Any, length: int, rows: int, reserved: int) -> tuple[Check, ...]:
    """Checks that tokenizer and position table agree on the maximum `length` in tokens.

    The tokenizer cuts at `length`, and the last of `length` tokens reads row `reserved + length - 1` of `rows`.
    """
    last = reserved + length - 1
    return (
        equals("tokenizer's model_max_length", int(tokenizer.model_max_length), length),
        at_most("last position row at the maximum length", last, rows - 1, "last row of the position table"),
    )


@contextmanager
def staged_folder(out: str | Path) -> Iterator[Path]:
    """A folder to save into that becomes `out` when the block ends well, and vanishes when it raises.

    It lies beside `out` (renaming within one file system is atomic). Raises `UserError` before anything is written if
    `out` exists, or if its parent cannot hold it.
    """
    out = Path(out)
    refuse_existing(out)
    folder = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.partial"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write into {out.parent}: {error.strerror}; choose another output folder") from error
    try:
        yield folder
        refuse_existing(out)
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def refuse_existing(out: str | Path) -> None:
    """Raise `UserError` if `out` exists: a conversion never overwrites. For a check before the long work starts."""
    if os.path.lexists(out):
        raise UserError(
            f"output folder {out} exists; a conversion overwrites nothing: choose another name or remove it"
        )


def write(certificate: Certificate, folder: str | Path) -> None:
    """Write `conversion.json` and the certificate's section of the model card into `folder`.

    A card (`README.md`) that is there keeps its text: an older certificate in it is replaced, otherwise the section
    goes to its end. A new card gets the metadata that the hub reads.
    """
    folder = Path(folder)
    (folder / CERTIFICATE_FILE).write_text(certificate.to_json(), encoding="utf-8")
    section = f"<!-- conversion certificate -->\n{certificate.to_markdown()}<!-- end of conversion certificate -->\n"
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.exists() else _new_card(certificate)
    kept = _SECTION.sub("", text).rstrip("\n")
    card.write_text(f"{kept}\n\n{section}", encoding="utf-8")


def read(folder: str | Path) -> Certificate:
    """The certificate saved in `folder`. Raises `UserError` when there is none, or when it is not one."""
    path = Path(folder) / CERTIFICATE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("passed")
        checks = tuple(Check(**check) for check in content.pop("checks"))
        return Certificate(**content, checks=checks)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not there; the folder was not made by a conversion: convert the model again"
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no conversion certificate ({error}); convert the model again") from error


def _new_card(certificate: Certificate) -> str:
    base = certificate.source
    # The hub only knows names such as `roberta-base` or `owner/name`; a path on this machine means nothing there.
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not os.path.exists(base)
    metadata = [
        *([f"base_model: {base}"] if named else []),
        "library_name: transformers",
        f"tags:\n- {certificate.target}",
    ]
    return "---\n" + "\n".join(metadata) + f"\n---\n\n# {base}, converted to {certificate.target}\n"


def _reason(check: Check) -> str:
    bound = "" if check.bound is None or check.bound is True else f", allowed {_short(check.bound)}"
    return f"{check.name}: measured {_short(check.measured)}{bound}"


def _short(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
