"""The stage ``extract``: record the queries and keys of a model, layer by layer, as it reads text.

Samples are text blocks of the training split (``qk``, what projections and centroids learn from) and of the validation split
(``qk_validation``, what ``score`` reads), drawn over the whole split by a seed, so that a subset is no single document.
Memory is bounded: each batch is written as it comes, and the file is put together from mapped pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefinder import models
from sparsefinder.attention import Masked
from sparsefinder.corpora import Corpus, TokenBlocks, token_blocks
from sparsefinder.graphs import Attention
from sparsefinder.patterns.full import Full
from sparsefinder.samples import Samples
from sparsefinder.store import Store, UserError, make_folder, progress, remove

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of the stage ``extract``."""

    corpus: Corpus
    nsamples: int = 50  # of the training split
    nsamples_validation: int | None = None  # of the validation split; None: a fifth of nsamples, at least 5
    length: int | None = None  # most tokens of a sample; None: what the model can take
    batch_size: int = 8  # samples that the model reads at a time
    dtype: str = "float32"  # of the file: float32, float16 or bfloat16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nsamples", "nsamples_validation", "length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be 1 or more, got {value}")
        if self.dtype not in DTYPES:
            raise UserError(f"extract.dtype={self.dtype} is unknown; choose one of {', '.join(DTYPES)}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage."""
        return ("model",)

    @property
    def inputs(self) -> dict[str, str]:
        """What else the result depends on, by content."""
        return {"corpus": self.corpus.fingerprint()}

    @property
    def held_out(self) -> int:
        """Samples of the validation split."""
        return self.nsamples_validation or max(5, self.nsamples // 5)


def run(settings: ExtractSettings, store: Store) -> None:
    """Make ``qk`` and ``qk_validation`` with ``model``."""
    model, tokenizer = models.load_masked_lm(store.path("model"))
    length = min(settings.length or 1 << 30, models.describe(model).max_length)
    for name, split, wanted in (("qk", "train", settings.nsamples), ("qk_validation", "validation", settings.held_out)):
        blocks = token_blocks(settings.corpus, tokenizer, split, length, cache=store.scratch("corpus"))
        chosen = draw(len(blocks), wanted, settings.seed, f"the {split} split of the corpus")
        _announce(model, blocks.lengths[chosen].tolist(), settings, name)
        pieces = store.scratch(f"{name}_pieces")
        try:
            samples = record(model, blocks, chosen, tokenizer.pad_token_id, settings, pieces)
            with store.writing(name) as path:
                samples.save(path)
        finally:
            remove(pieces)
        store.note(name, samples=len(samples), tokens=sum(samples.lengths), split=split)


def draw(available: int, wanted: int, seed: int, what: str) -> list[int]:
    """``wanted`` of ``available`` places, drawn by the seed and sorted; a larger draw contains a smaller one."""
    if wanted > available:
        raise UserError(f"nsamples={wanted}, but {what} has only {available} blocks: ask for fewer, or give more text")
    order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
    return sorted(order[:wanted].tolist())


def record(
    model: Any, blocks: TokenBlocks, chosen: Sequence[int], pad_token_id: int, settings: ExtractSettings, folder: Path
) -> Samples:
    """The queries and keys of each chosen block, ``(L, H, n_i, D)``, in tensors mapped from files of ``folder``."""
    recorder = Recorder(Masked(Full(), models.get_normalizer(model)))
    make_folder(folder)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    with models.plugged(model, recorder), torch.inference_mode():
        for start in progress(range(0, len(chosen), settings.batch_size), "extract"):
            batch = chosen[start : start + settings.batch_size]
            ids, valid = blocks.batch(batch, pad_token_id)
            recorder.layers.clear()
            model.base_model(input_ids=ids.to(model.device), attention_mask=valid.to(model.device))
            for place, length in enumerate(valid.sum(-1).tolist()):
                for side, found in enumerate(sides):
                    each = [recorder.layers[layer][side][place, :, :length] for layer in sorted(recorder.layers)]
                    file = folder / f"{'qk'[side]}{start + place}.raw"
                    found.append(_on_disk(torch.stack(each).to(DTYPES[settings.dtype]), file))
    return Samples(*sides)


@dataclass
class Recorder:
    """An attention that lets another one work and keeps the queries and keys it was given, by layer."""

    attention: Attention
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int) -> Tensor:
        self.layers[layer] = (q, k)
        return self.attention(q, k, v, valid, layer)


def _on_disk(tensor: Tensor, file: Path) -> Tensor:
    mapped = torch.from_file(str(file), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return mapped.copy_(tensor)


def _announce(model: Any, lengths: Sequence[int], settings: ExtractSettings, name: str) -> None:
    shape = models.describe(model)
    numbers = 2 * shape.layers * shape.heads * shape.head_size * sum(lengths)
    log.info(
        "%s: %d samples, %d tokens, %d layers × %d heads × %d: the file will take %.1f MB",
        *(name, len(lengths), sum(lengths), shape.layers, shape.heads, shape.head_size),
        numbers * DTYPES[settings.dtype].itemsize / 1e6,
    )
