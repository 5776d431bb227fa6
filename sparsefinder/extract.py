"""The stage ``extract``: record the queries and keys of a model, layer by layer, as it reads text.

Samples are text blocks of the training split (``qk``, what projections and centroids learn from) and of the validation split
(``qk_validation``, what ``score`` reads), drawn over the whole split by a seed, so that a subset is no single document.
Memory is bounded: queries and keys are written in files of ``shard_size`` as they come. Where they are few, these are put
together to the one file of the published form; where they are more than ``file_size``, they stay as they are, a folder of such
files (see `sparsefinder.storage.samples`). Several processes record neighbouring batches each, and the samples are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from sparsefinder import models
from sparsefinder.attention import Dense
from sparsefinder.corpora import Batch, Corpus, Denoising, TokenBlocks, block_length, token_blocks
from sparsefinder.corpora.blocks import draw
from sparsefinder.corpora.packing import APART, pack_of
from sparsefinder.errors import UserError, one_of
from sparsefinder.models.documents_apart import read_apart
from sparsefinder.models.families import TRAITS
from sparsefinder.models.objectives import collated, is_causal, objective_of, whole_text
from sparsefinder.models.observed_attention import Recorder, Watched
from sparsefinder.storage import distributed
from sparsefinder.storage.files import make_folder, remove
from sparsefinder.storage.samples import ShardWriter, join
from sparsefinder.storage.store import Store, progress

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExtractSettings:
    """Settings of the stage ``extract``."""

    corpus: Corpus
    nsamples: int = 50  # of the training split; with corpus.pack=apart blocks, whose every document is a sample
    nsamples_validation: int | None = None  # of the validation split; None: a fifth of nsamples, at least 5
    length: int | None = None  # most tokens of a sample; None: what the model can take
    batch_size: int = 8  # samples that the model reads at a time
    dtype: str = "float32"  # of the file: float32, float16 or bfloat16
    shard_size: float = 64.0  # MiB that are collected in memory before they are written
    # MiB up to which there is one file, as published; a folder of files beyond
    file_size: Annotated[float, "or infinite"] = 1024.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("nsamples", "nsamples_validation", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be 1 or more, got {value}")
        for name in ("shard_size", "file_size"):
            if not getattr(self, name) >= 0:
                raise UserError(f"extract.{name} must be a number of MiB, 0 or more, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise UserError(f"extract.dtype={self.dtype} is unknown; {one_of(DTYPES, self.dtype)}")

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
    model, tokenizer = models.load_language_model(store.path("model"))
    read_apart(model, tokenizer, settings.corpus)
    which = which_of(model, store)
    shape = models.describe(model, which)
    length = block_length(settings.length, shape.max_length, "extract.length")
    for name, split, wanted in (("qk", "train", settings.nsamples), ("qk_validation", "validation", settings.held_out)):
        _extract(name, split, wanted, length, Reading(model, tokenizer, which), settings, store)


def which_of(model: Any, store: Store) -> str:
    """The attention that is recorded; a `UserError` where the model has another one."""
    attentions = TRAITS[model.config.model_type].attentions
    if store.which not in attentions:
        raise UserError(
            f"which={store.which}, but a {model.config.model_type} has {' and '.join(attentions)}: give which={attentions[0]}"
            + (" causal=true" if attentions == ("dec",) else "")
        )
    return store.which


@dataclass(frozen=True)
class Reading:
    """A model, and which of its attentions is looked at while it reads."""

    model: Any
    tokenizer: Any
    which: str

    def batch(self, blocks: TokenBlocks, indices: Sequence[int], seed: int) -> Batch:
        """What the model reads of some blocks: their text, or of an encoder-decoder the damaged text and the whole one."""
        objective = objective_of(self.model, self.tokenizer)
        if not isinstance(objective, Denoising):
            ids, valid = blocks.batch(indices, self.tokenizer.pad_token_id)
            return {"input_ids": ids, "attention_mask": valid}
        examples = [objective(blocks[index], seed, index) for index in indices]
        return whole_text(self.model, collated(objective, examples, self.tokenizer.pad_token_id))


def _extract(
    name: str, split: str, wanted: int, length: int, reading: Reading, settings: ExtractSettings, store: Store
) -> None:
    cache, shards = store.scratch("corpus"), store.scratch(f"{name}_shards")
    blocks = distributed.first_then_all(
        lambda: token_blocks(settings.corpus, reading.tokenizer, split, length, cache=cache)
    )
    chosen = draw(len(blocks), wanted, settings.seed, f"the {split} split of the corpus")
    lengths = blocks.lengths[chosen].tolist()
    size = estimated_size(reading.model, lengths, settings, reading.which)
    what = "blocks of documents" if pack_of(settings.corpus) == APART else "samples"
    log.info("%s: %d %s, %d tokens: %.1f MiB", name, wanted, what, sum(lengths), size)
    distributed.once(lambda: _emptied(shards))
    samples = sum(distributed.parts(lambda: record(reading, blocks, chosen, settings, shards)))
    if distributed.first():
        _keep(store, name, shards, size <= settings.file_size)
        store.note(name, samples=samples, tokens=sum(lengths), split=split)


def _emptied(folder: Path) -> None:
    remove(folder)
    make_folder(folder)


def _keep(store: Store, name: str, shards: Path, as_file: bool) -> None:
    with store.writing(name) as path:
        if as_file:
            join(shards, path)
        else:
            shards.rename(path)
    remove(shards)


def record(
    reading: Reading, blocks: TokenBlocks, chosen: Sequence[int], settings: ExtractSettings, folder: Path
) -> int:
    """Write the queries and keys ``(L, H, n_i, D)`` of this process's part of the chosen blocks to files in ``folder``.

    A batch holds the same blocks however many processes there are, because what is beside a block may change its last digits.
    Documents that lie apart in a block (`sparsefinder.models.documents_apart`) are recorded as they attend, each by itself.

    Returns:
        How many samples these are.
    """
    model, which = reading.model, reading.which
    recorder = Recorder()
    dense = Dense(models.get_normalizer(model), causal=is_causal(model, which))
    batches = [chosen[start : start + settings.batch_size] for start in range(0, len(chosen), settings.batch_size)]
    size = int(settings.shard_size * (1 << 20))
    samples = 0
    writer = ShardWriter(folder, f"{distributed.rank():04d}-", size, between_texts=which == "cross")
    with models.plugged(model, Watched(dense, recorder), which), torch.inference_mode():
        for batch in progress(distributed.share(batches), "extract"):
            recorder.layers.clear()
            read = reading.batch(blocks, batch, settings.seed)
            model.base_model(**{name: tensor.to(model.device) for name, tensor in read.items()})
            recorded = [recorder.layers[layer] for layer in sorted(recorder.layers)]
            queries, keys = recorded[0].queries_valid.sum(-1).tolist(), recorded[0].lengths.tolist()
            samples += len(queries)
            for row in range(len(queries)):
                q = torch.stack([qk.q[row, :, : queries[row]].cpu() for qk in recorded])
                k = torch.stack([qk.k[row, :, : keys[row]].cpu() for qk in recorded])
                writer.add(q.to(DTYPES[settings.dtype]), k.to(DTYPES[settings.dtype]))
    writer.close()
    return samples


def estimated_size(model: Any, lengths: Sequence[int], settings: ExtractSettings, which: str | None = None) -> float:
    """MiB that the queries and keys of samples of these lengths will take."""
    shape = models.describe(model, which)
    numbers = shape.layers * (shape.heads + shape.key_heads) * shape.head_size * sum(lengths)
    return numbers * DTYPES[settings.dtype].itemsize / (1 << 20)
