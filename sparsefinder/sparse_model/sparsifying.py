"""From a checkpoint and a file of texts to a folder with a sparse model and its certificate: what the command line calls.

The certificate says how far the sparse model is from the dense one on text that nothing was learned from, at three lengths, what
it costs there, and that what was saved is what was measured.
"""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sparsefinder.conversions import card
from sparsefinder.conversions.certificate import Certificate, Check, at_most, states
from sparsefinder.conversions.checks import max_difference
from sparsefinder.conversions.staging import refuse_existing, staged_folder
from sparsefinder.corpora.documents import documents_of, unit_of
from sparsefinder.corpora.reading import files_named, lines_of
from sparsefinder.errors import UserError
from sparsefinder.models import describe
from sparsefinder.models.checkpoints import check_that_it_runs, load_model, load_tokenizer, open_checkpoint
from sparsefinder.sparse_model import card as card_of_model
from sparsefinder.sparse_model.attaching import attach, attachment, detach
from sparsefinder.sparse_model.fitting import fit
from sparsefinder.sparse_model.index_files import NUMBERS
from sparsefinder.sparse_model.loading import load
from sparsefinder.sparse_model.measuring import difference, outputs
from sparsefinder.sparse_model.texts import special_tokens
from sparsefinder.storage.files import files_of

CLOSEST = (
    0.01  # 1 − the cosine of the pooled output to the dense one that is allowed at each length, the prediction at work
)
SLOWEST = 1.03  # time with auto, in that of the dense model
SAVED = 1e-6  # difference of hidden states after save and reload
_LONGEST = 8192  # tokens, where a model reads any length
_HELD_OUT = 10  # every so many-th text is kept for the certificate
_ROUNDS = 5  # of a time, whose least counts; in turn, so that what else the machine does hits both


def sparsify(
    name_or_path: str,
    texts: str,
    out: str | Path,
    *,
    density: float | None = None,
    recall: float | None = None,
    loss_tolerance: float | None = None,
    pattern: str | None = None,
    window: int | None = None,
    global_tokens: int = 0,
    length: int | None = None,
    seed: int = 0,
    even_if_it_fails: bool = False,
) -> Certificate:
    """Learn an index for a checkpoint, attach it, and save both with their certificate.

    Args:
        name_or_path: A folder, or a name on the hub.
        texts: A file of plain text, a folder of them, or a pattern such as ``texts/*.txt``.
        out: The folder to make.
        density: As in `sparsefinder.attach`; of this and the next two one may be given.
        recall: Likewise.
        loss_tolerance: Likewise.
        pattern: As in `sparsefinder.fit`.
        window: Likewise.
        global_tokens: Likewise.
        length: The longest of the three lengths; None for what the model reads, 8,192 at most.
        seed: Of `sparsefinder.fit`.
        even_if_it_fails: Save although a check failed; the certificate says which.

    Returns:
        The certificate.

    Raises:
        UserError: For wrong input, and where the certificate fails; then nothing is saved.
    """
    refuse_existing(out)
    model, tokenizer = _loaded(name_or_path)
    most = describe(model).max_length
    length = min(most, _LONGEST) if length is None else length
    if not 16 <= length <= most:
        raise UserError(f"length={length}: this model reads up to {most} tokens; give fewer, and at least 16")
    documents = [document for file in files_named(texts, "texts") for document in _documents(file)]
    index = fit(
        *(model, tokenizer, [d for i, d in enumerate(documents) if i % _HELD_OUT]),
        pattern=pattern,
        window=window,
        global_tokens=global_tokens,
        seed=seed,
    )
    held_out = _cuts(tokenizer, documents[::_HELD_OUT], [length // 4, length // 2, length])
    target = {"density": density, "recall": recall, "loss_tolerance": loss_tolerance}
    dense = copy.deepcopy(model)
    closeness = _closeness(model, dense, index, target, held_out)
    attach(model, index, **target)  # type: ignore[arg-type]
    seconds = [_seconds(partial(outputs, model, [text]), partial(outputs, dense, [text])) for text in held_out]
    checks = [*closeness, *_times(held_out, seconds)]
    setting = attachment(model).setting
    given = {name: value for name, value in target.items() if value is not None}
    settings = {"pattern": index.configuration.label, "target": setting.target, **given, "texts": texts, "seed": seed}
    certificate = Certificate(name_or_path, "sparse attention", settings, tuple(checks))
    if not even_if_it_fails:
        certificate.require()
    with staged_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card_of_model.write(attachment(model), folder, _measured(held_out, [c.measured for c in closeness], seconds))
        certificate = certificate.with_checks(*_reloaded(model, folder, held_out[0]))
        if not even_if_it_fails:
            certificate.require()
        card.write(certificate, folder)
    return certificate


def _loaded(name_or_path: str) -> tuple[Any, Any]:
    checkpoint = open_checkpoint(name_or_path)
    named = next(iter(checkpoint.settings.get("architectures") or ()), "AutoModel")
    model, _ = load_model(checkpoint, getattr(transformers, named, transformers.AutoModel), dtype=torch.float32)
    check_that_it_runs(model, checkpoint.label)
    return model, load_tokenizer(checkpoint, model.get_input_embeddings().weight.shape[0])


def _documents(file: Path) -> Any:
    return documents_of(lines_of(file, "texts"), unit_of(lines_of(file, "texts")))


def _cuts(tokenizer: Any, documents: Sequence[str], lengths: Sequence[int]) -> list[Tensor]:
    """Of the held-out documents, one after the other, a text ``(1, n)`` of each length; where they end they begin again."""
    ids = [
        i for document in documents for i in tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    if not ids:
        raise UserError("no text is left to measure on: give more than ten texts")
    ids = ids * math.ceil(max(lengths) / len(ids))
    before, after = special_tokens(tokenizer)
    special = len(before) + len(after)
    return [torch.tensor([[*before, *ids[: length - special], *after]]) for length in lengths]


def _closeness(
    model: Any, dense: Any, index: Any, target: dict[str, float | None], texts: Sequence[Tensor]
) -> list[Check]:
    attach(model, index, **target, auto=False)  # type: ignore[arg-type]
    checks = [
        at_most(
            f"difference of the pooled output at {text.shape[1]} tokens",
            difference(outputs(dense, [text]), outputs(model, [text])),
            CLOSEST,
            "1 − cosine to the dense model on held-out text, the prediction at every length",
        )
        for text in texts
    ]
    detach(model)
    return checks


def _times(texts: Sequence[Tensor], seconds: Sequence[Sequence[float]]) -> list[Check]:
    threads = torch.get_num_threads()
    return [
        at_most(
            f"time at {text.shape[1]} tokens, in that of the dense model",
            ours / theirs,
            SLOWEST,
            f"{1e3 * ours:.1f} ms and {1e3 * theirs:.1f} ms, the least of {_ROUNDS}, with {threads} threads",
        )
        for text, (ours, theirs) in zip(texts, seconds, strict=True)
    ]


def _measured(texts: Sequence[Tensor], differences: Sequence[Any], seconds: Sequence[Sequence[float]]) -> str:
    """Quality beside time, for the model's card."""
    rows = [
        f"| {text.shape[1]:,} | {different:.2g} | {ours:.3f} | {theirs:.3f} |"
        for text, different, (ours, theirs) in zip(texts, differences, seconds, strict=True)
    ]
    return "\n".join(
        [
            f"One held-out text of each length: that difference with the prediction at work, and seconds, the least of {_ROUNDS} "
            f"with {torch.get_num_threads()} threads of {platform.processor() or platform.machine()}.",
            "",
            "| tokens | difference | seconds | seconds of the dense model |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def _seconds(*calls: Callable[[], object]) -> list[float]:
    best = [math.inf] * len(calls)
    for call in calls:
        call()  # compiled, and raced
    for _ in range(_ROUNDS):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - start)
    return best


def _reloaded(model: Any, folder: Path, text: Tensor) -> list[Check]:
    again = load(folder)
    difference_ = max_difference(outputs(model, [text])[0][None], outputs(again, [text])[0][None])
    size = sum(file.stat().st_size for file in files_of(folder / NUMBERS)) / (1 << 20)
    return [
        at_most("difference of hidden states after save and reload", difference_, SAVED, f"{text.shape[1]} tokens"),
        states("size of the index in MiB", size),
    ]
