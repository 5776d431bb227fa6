"""A model card's section about the index that lies beside the weights: base model, density, quality, how to load it."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from sparsefinder.sparse_model.attaching import Attachment

CARD = "README.md"
_SECTION = re.compile(r"<!-- sparsefinder -->.*?<!-- end of sparsefinder -->\n?", re.DOTALL)


def write(attachment: Attachment, folder: Path, measured: str = "") -> None:
    """Write the section into the card of a folder; what else the card says stays.

    Args:
        attachment: What was attached when the model was saved.
        folder: The model's.
        measured: What else was measured of it, as markdown.
    """
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else _new_card(attachment)
    path.write_text(f"{_SECTION.sub('', text).rstrip()}\n\n{_section(attachment, measured)}", encoding="utf-8")


def forget(folder: Path) -> None:
    """Take the section out of the card of a folder, where it has one: of a model that nothing is attached to any more."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if _SECTION.search(text):
        path.write_text(_SECTION.sub("", text), encoding="utf-8")


def push(attachment: Attachment, repository: str, where: dict[str, Any]) -> None:
    """Add the section to the card that a repository of the hub has; ``where``: token, revision, create_pr."""
    from huggingface_hub import HfApi, hf_hub_download

    at = {name: where[name] for name in ("token", "revision") if where.get(name) is not None}
    with tempfile.TemporaryDirectory() as folder:
        held = Path(hf_hub_download(repository, CARD, **at)).read_text(encoding="utf-8")
        (Path(folder) / CARD).write_text(held, encoding="utf-8")
        write(attachment, Path(folder))
        HfApi().upload_file(
            path_or_fileobj=str(Path(folder) / CARD),
            path_in_repo=CARD,
            repo_id=repository,
            commit_message="Say what is attached, and how to load it",
            create_pr=bool(where.get("create_pr")),
            **at,
        )


def _section(attachment: Attachment, measured: str) -> str:
    index, setting = attachment.index, attachment.setting
    facts = index.facts
    learned = (
        f"{facts['texts']:,} texts, {facts['tokens']:,} tokens" if "texts" in facts else facts.get("source", "unknown")
    )
    softmax = "softmax" if index.base.alpha == 1.0 else f"{index.base.alpha:g}-entmax"
    label = setting.dialled(index.configuration).label
    where = "dense attention below the length at which that pays" if setting.auto else "at every length"
    lines = [
        "<!-- sparsefinder -->",
        "## Sparse attention",
        "",
        f"This model attends on a graph that is predicted before any score is computed: `{label}` of "
        f"[sparsefinder](https://pypi.org/project/sparsefinder), {where}; learned from {learned} for `{_named(index.base.name)}` "
        f"({index.base.layers} layers of {index.base.heads} heads, {softmax}).",
        "",
        "```python",
        "import sparsefinder  # pip install sparsefinder",
        "",
        'model = sparsefinder.load("PATH_OR_NAME")  # AutoModel.from_pretrained does the same after `import sparsefinder`',
        "```",
        "",
        "`sparsefinder.detach(model)` gives the dense model back. Without the package loading ends in an error that names it.",
        "",
    ]
    if index.quality:
        lines += [
            f"Held-out texts of up to {int(max(row['tokens'] for row in index.quality)):,} tokens; difference: 1 − the cosine "
            "of the mean-pooled output to that of the dense model.",
            "",
            "| density | recall | difference |",
            "|---|---|---|",
            *(f"| {r['measured_density']:.3f} | {r['recall']:.3f} | {r['difference']:.2g} |" for r in index.quality),
            "",
        ]
    return "\n".join(lines + ([measured, ""] if measured else []) + ["<!-- end of sparsefinder -->", ""])


def _is_of_the_hub(name: str) -> bool:
    """The hub knows names such as `roberta-base` or `owner/name`; a path on this machine means nothing there."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not os.path.exists(name)


def _named(name: str) -> str:
    return name if _is_of_the_hub(name) else os.path.basename(os.path.normpath(name)) if name else "an unnamed model"


def _new_card(attachment: Attachment) -> str:
    base = attachment.index.base.name
    named = _is_of_the_hub(base)
    metadata = [*([f"base_model: {base}"] if named else []), "library_name: transformers", "tags:\n- sparsefinder"]
    title = base if named else "A model"
    return "---\n" + "\n".join(metadata) + f"\n---\n\n# {title}, with predicted sparse attention\n"
