"""The certificate of a conversion: what was measured, what was allowed; saved with the model, or nothing is saved.

    certificate = Certificate(source="roberta-base", target="longformer", settings={"attention_window": 512})
    certificate = certificate.with_checks(
        at_most("short-input difference to the source", checks.max_difference(source_states, states, valid), 1e-4),
        *checks.check_ids(tokenizer, vocab_size=len(embedding_rows)),
    )
    certificate.require()
    measuring.save_certified(model, tokenizer, certificate, out, checks_after_reload)

Nothing here knows a model family, or imports torch or transformers.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sparsefinder.errors import UserError

CERTIFICATE_FILE = "conversion.json"

Value = bool | int | float | str | None


@dataclass(frozen=True)
class Check:
    """One statement about a converted model, with the evidence for it."""

    name: str
    """What was looked at, as a phrase."""
    measured: Value
    """What came out."""
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


def _reason(check: Check) -> str:
    bound = "" if check.bound is None or check.bound is True else f", allowed {shown(check.bound)}"
    return f"{check.name}: measured {shown(check.measured)}{bound}"


def shown(value: Value) -> str:
    """A value as people read it: floats to three digits, nothing for None."""
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
