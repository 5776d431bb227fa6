"""A converted model's card: the certificate for people, beside the one for programs."""

import os
import re
from pathlib import Path

from sparsefinder.conversions.certificate import CERTIFICATE_FILE, Certificate, shown

CARD_FILE = "README.md"

_SECTION = re.compile(r"<!-- conversion certificate -->.*?<!-- end of conversion certificate -->\n?", re.DOTALL)


def write(certificate: Certificate, folder: str | Path) -> None:
    """Write `conversion.json` and the certificate's section of the model card into `folder`.

    A card (`README.md`) that is there keeps its text: an older certificate in it is replaced, otherwise the section
    goes to its end. A new card gets the metadata that the hub reads.
    """
    folder = Path(folder)
    (folder / CERTIFICATE_FILE).write_text(certificate.to_json(), encoding="utf-8")
    section = f"<!-- conversion certificate -->\n{to_markdown(certificate)}<!-- end of conversion certificate -->\n"
    card = folder / CARD_FILE
    text = card.read_text(encoding="utf-8") if card.exists() else _new_card(certificate)
    kept = _SECTION.sub("", text).rstrip("\n")
    card.write_text(f"{kept}\n\n{section}", encoding="utf-8")


def to_markdown(certificate: Certificate) -> str:
    """The certificate as a section of a model card: a sentence, the settings and a table of checks."""
    verdict = "passed" if certificate.passed else "FAILED"
    settings = ", ".join(f"`{name}={value}`" for name, value in certificate.settings.items()) or "defaults"
    made = ", ".join(f"{name} {number}" for name, number in certificate.versions.items())
    lines = [
        "## Conversion certificate",
        "",
        f"Converted from `{certificate.source}` to {certificate.target} ({settings}) with {made}. "
        f"{len(certificate.checks)} checks: {verdict}. The same figures are in `{CERTIFICATE_FILE}`.",
        "",
        "| check | measured | bound | passed | note |",
        "|---|---|---|---|---|",
    ]
    for check in certificate.checks:
        cells = (
            check.name,
            shown(check.measured),
            shown(check.bound),
            "yes" if check.passed else "**no**",
            check.note,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


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
