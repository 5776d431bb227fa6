"""Queries and keys on disk, in the form of the published Sparsefinder.

``torch.save`` of ``{"length_src": (num_samples,) tensor or list of ints, "q": [tensor (L, H, n_i, D)], "k": [...]}``. Keys
have fewer heads where heads of queries share them, and in cross-attention as many tokens as ``length_src`` says, where
``length_tgt`` is that of the queries. A
layer of a sample costs memory when it is taken, and only as long as it is used, so files larger than memory work.

Queries and keys that are too many for one file lie in a folder of such files, whose samples follow one another in the
order of the files' names. `Samples` does not tell one from the other, and `join` makes a file of a folder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.storage.tensor_files import StoredTensor, load_tensors, save_tensors, stored


class Layers(Protocol):
    """A tensor ``(L, H, n, D)`` of which single layers are taken: one in memory, or a `StoredTensor`."""

    @property
    def shape(self) -> Sequence[int]:
        """``(L, H, n, D)``."""

    def __getitem__(self, layer: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Scaled:
    """Layers times a number, in float32, each multiplied when it is taken."""

    layers: Layers
    factor: float

    @property
    def shape(self) -> Sequence[int]:
        """``(L, H, n, D)``."""
        return self.layers.shape

    def __getitem__(self, layer: int) -> Tensor:
        return self.layers[layer].float() * self.factor


@dataclass(frozen=True)
class MeanOfGroup:
    """The mean of the heads of queries that share one of keys, in float32, taken when a layer is."""

    layers: Layers
    group: int

    @property
    def shape(self) -> Sequence[int]:
        """``(L, H_k, n, D)``."""
        layers, heads, tokens, size = self.layers.shape
        return layers, heads // self.group, tokens, size

    def __getitem__(self, layer: int) -> Tensor:
        return self.layers[layer].float().unflatten(0, (-1, self.group)).mean(1)


@dataclass(frozen=True)
class Samples:
    """Ragged queries and keys of all layers.

    Args:
        q: Queries of each sample, ``(L, H, n_i, D)`` without padding.
        k: Keys of each sample, ``(L, H_k, n_i, D)``; of cross-attention with another number of tokens.
        source: Where they come from, for messages.
        between_texts: Whether queries and keys are tokens of two texts, also where these have one length.
    """

    q: Sequence[Layers]
    k: Sequence[Layers]
    source: str = "memory"
    between_texts: bool = False

    def __len__(self) -> int:
        return len(self.q)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(L, H, D)``, the same for every sample."""
        layers, heads, _, size = self.q[0].shape
        return layers, heads, size

    @property
    def group(self) -> int:
        """Heads of queries that share one of keys."""
        return self.q[0].shape[1] // self.k[0].shape[1]

    @property
    def lengths(self) -> list[int]:
        """Keys of each sample."""
        return [sample.shape[2] for sample in self.k]

    @property
    def query_lengths(self) -> list[int]:
        """Queries of each sample, the same tokens but in cross-attention."""
        return [sample.shape[2] for sample in self.q]

    @property
    def crosses(self) -> bool:
        """Whether queries and keys are tokens of two texts; a file says so by ``length_tgt``."""
        return self.between_texts or self.lengths != self.query_lengths

    def layer(self, index: int, layer: int, causal: bool = False) -> QK:
        """One sample and layer as a batch of one, float32. NaN or infinity is a `UserError`."""
        return next(self.layers(index, causal, only=[layer]))

    def layers(self, index: int, causal: bool = False, only: Sequence[int] | None = None) -> Iterator[QK]:
        """The layers of one sample, each a batch of one, float32, taken when asked for; keys repeated where heads share them.

        Args:
            index: Which sample.
            causal: Whether queries may attend to no later key.
            only: Layers to take; None for all.

        Raises:
            UserError: A value is NaN or infinite.
        """
        for layer in range(self.shape[0]) if only is None else only:
            q, k = self.q[index][layer].float(), self.k[index][layer].float()
            # a sum of numbers is a number unless it overflows, and takes a fifth of the time of looking at each
            if not (q.sum() + k.sum()).isfinite():
                self._check(index, layer, q, k)
            valid = torch.ones(1, k.shape[1], dtype=torch.bool, device=q.device)
            queries = torch.ones(1, q.shape[1], dtype=torch.bool, device=q.device) if self.crosses else None
            yield QK(q[None], k[None], valid, causal and queries is None, queries).a_key_each

    def _check(self, index: int, layer: int, q: Tensor, k: Tensor) -> None:
        for name, tensor in (("q", q), ("k", k)):
            if not torch.isfinite(tensor).all():
                raise UserError(
                    f"{self.source}: {name} of sample {index}, layer {layer} contains NaN or infinity; "
                    "extract the file again, or remove the sample"
                )

    def __iter__(self) -> Iterator[list[QK]]:
        return (list(self.layers(index)) for index in range(len(self)))

    def with_queries_times(self, scale: float | str) -> Samples:
        """Queries multiplied by a number: those of fairseq's models are stored divided by √D.

        Args:
            scale: The number, or ``sqrt_d`` for √D.
        """
        factor = math.sqrt(self.shape[2]) if scale == "sqrt_d" else float(scale)
        return replace(self, q=[Scaled(sample, factor) for sample in self.q])

    @property
    def in_groups(self) -> Samples:
        """One head of queries for each of keys: the mean of those that share it.

        Raises:
            UserError: Every head has keys of its own.
        """
        if self.group == 1:
            raise UserError(
                f"share_in_group=true is for heads that share their keys, and in {self.source} each has its own: leave it out"
            )
        return replace(self, q=[MeanOfGroup(sample, self.group) for sample in self.q])

    def part(self, start: int, stop: int) -> Samples:
        """Samples ``start`` to ``stop``."""
        return replace(self, q=self.q[start:stop], k=self.k[start:stop])

    def split_last_tenth(self) -> tuple[Samples, Samples]:
        """All but the last tenth, and the last tenth (at least one sample), held out."""
        held_out = max(1, len(self) // 10)
        return self.part(0, len(self) - held_out), self.part(len(self) - held_out, len(self))

    def save(self, path: Path | str) -> None:
        """Write the published form. Tensors that lie in files are mapped one by one: memory can be taken back."""
        lengths = {"length_src": torch.tensor(self.lengths)}
        if self.crosses:
            lengths["length_tgt"] = torch.tensor(self.query_lengths)
        q, k = ([_mapped(tensor) for tensor in side] for side in (self.q, self.k))
        save_tensors({**lengths, "q": q, "k": k}, path)


def load_samples(path: Path | str) -> Samples:
    """Queries and keys in a file (ours or the published Sparsefinder's), or in a folder of files.

    Args:
        path: A file, or a folder of files ``*.pt`` in the order of their names.

    Raises:
        UserError: A file is missing, truncated, carries code, has another structure, or its shapes or ``length_src``
            disagree. Values are checked when a sample is taken.
    """
    path = Path(path)
    if not path.is_dir():
        return _load_file(path)
    files = sorted(path.glob("*.pt"))
    if not files:
        raise UserError(f"{path}: a folder of queries and keys needs files *.pt; this one has none")
    parts = [_load_file(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.shape != parts[0].shape:
            raise UserError(
                f"{file} has (layers, heads, head size) {part.shape}, {files[0].name} beside it has {parts[0].shape}: they "
                "were not recorded together"
            )
    q, k = ([s for part in parts for s in getattr(part, side)] for side in ("q", "k"))
    return Samples(q, k, str(path), any(part.crosses for part in parts))


def _load_file(path: Path) -> Samples:
    content = load_tensors(path, "queries and keys")
    if not isinstance(content, dict) or not {"length_src", "q", "k"} <= content.keys():
        raise UserError(
            f"{path}: needs a dict with length_src, q and k (the output of stage=extract), got {_outline(content)}"
        )
    q, k, lengths = content["q"], content["k"], content["length_src"]
    if not isinstance(q, (list, tuple)) or not isinstance(k, (list, tuple)):
        raise UserError(f"{path}: q and k must be lists of tensors (L, H, n, D), got {_outline(q)} and {_outline(k)}")
    if not q:
        raise UserError(f"{path}: holds no sample; run stage=extract with nsamples of 1 or more")
    if len(q) != len(k):
        raise UserError(f"{path}: {len(q)} samples of q but {len(k)} of k; they must come in pairs")
    between_texts = "length_tgt" in content
    _check_tensors(path, q, k, between_texts)
    if between_texts:
        _check_lengths(path, _whole_numbers(path, content["length_tgt"]), [sample.shape[2] for sample in q], "tgt", "q")
    _check_lengths(path, _whole_numbers(path, lengths), [sample.shape[2] for sample in k], "src", "q")
    tensors = stored(path, content, [*q, *k])
    return Samples(tensors[: len(q)], tensors[len(q) :], str(path), between_texts)


def _check_lengths(path: Path, counts: list[int], sizes: list[int], side: str, name: str) -> None:
    if counts != sizes:
        where = next(
            (i for i, (a, b) in enumerate(zip(counts, sizes, strict=False)) if a != b), min(len(counts), len(sizes))
        )
        raise UserError(
            f"{path}: length_{side} disagrees with {name} at sample {where} ({len(counts)} lengths for {len(sizes)} samples"
            + (f"; {counts[where]} against {sizes[where]} tokens" if where < min(len(counts), len(sizes)) else "")
            + "); extract the file again"
        )


class ShardWriter:
    """Samples into files ``<prefix>00000.pt``, …, one as soon as there is enough for it.

    Args:
        folder: Where they go.
        prefix: Of their names.
        size: Of a file, in bytes.
        between_texts: Whether queries and keys are those of two texts.
    """

    def __init__(self, folder: Path | str, prefix: str, size: int, between_texts: bool = False):
        self.between_texts = between_texts
        self.folder, self.prefix, self.size = Path(folder), prefix, size
        self.files = self.bytes = 0
        self.q: list[Tensor] = []
        self.k: list[Tensor] = []

    def add(self, q: Tensor, k: Tensor) -> None:
        """One sample, ``(L, H, n, D)`` each, where heads share keys fewer of these."""
        self.q.append(q)
        self.k.append(k)
        self.bytes += (q.numel() + k.numel()) * q.itemsize
        if self.bytes >= self.size:
            self.close()

    def close(self) -> None:
        """Write what is left."""
        if self.q:
            Samples(self.q, self.k, between_texts=self.between_texts).save(
                self.folder / f"{self.prefix}{self.files:05d}.pt"
            )
            self.files += 1
        self.q, self.k, self.bytes = [], [], 0


def join(folder: Path | str, file: Path | str) -> None:
    """Write the queries and keys of a folder of files as one file of the published form."""
    load_samples(folder).save(file)


def _check_tensors(path: Path, q: Sequence[Any], k: Sequence[Any], between_texts: bool) -> None:
    first: tuple[int, int, int] | None = None
    for index, (sample_q, sample_k) in enumerate(zip(q, k, strict=True)):
        for name, sample in (("q", sample_q), ("k", sample_k)):
            if not isinstance(sample, Tensor) or sample.ndim != 4 or not sample.is_floating_point():
                raise UserError(
                    f"{path}: {name} of sample {index} must be a floating point tensor (layers, heads, tokens, head size), "
                    f"got {_outline(sample)}"
                )
        layers, heads, tokens, size = sample_q.shape
        same = sample_q.shape[::3] == sample_k.shape[::3] and (between_texts or tokens == sample_k.shape[2])
        if not same or heads % max(sample_k.shape[1], 1):
            hint = "" if between_texts else "; queries of another text need length_tgt beside length_src"
            raise UserError(
                f"{path}: sample {index} has q of shape {tuple(sample_q.shape)} but k of shape {tuple(sample_k.shape)}"
                + (hint if tokens != sample_k.shape[2] else "")
            )
        first = first or (layers, heads, size)
        if 0 in sample_q.shape or 0 in sample_k.shape:
            raise UserError(f"{path}: sample {index} is empty, its shape is {tuple(sample_q.shape)}")
        if (needed := 4 * heads * tokens * sample_k.shape[2]) > _memory():
            raise UserError(
                f"{path}: sample {index} has {tokens} tokens: the attention of one layer takes {needed / 1e9:.0f} GB, more than "
                "this machine has; extract shorter samples (extract.length)"
            )
        if (layers, heads, size) != first:
            raise UserError(
                f"{path}: sample {index} has {layers} layers, {heads} heads of size {size}, but sample 0 has "
                f"{first[0]} layers, {first[1]} heads of size {first[2]}"
            )


def _whole_numbers(path: Path, lengths: Any) -> list[int]:
    """``length_src`` as numbers: a tensor ``(num_samples,)`` of any dtype, as the published script writes floats, or a list.

    The numbers of a list may be tensors of one value.
    """
    if isinstance(lengths, Tensor) and lengths.ndim == 1:
        counts = lengths.tolist()
    elif isinstance(lengths, (list, tuple)):
        single = (length.item() if isinstance(length, Tensor) and length.numel() == 1 else length for length in lengths)
        counts = list(single)
    else:
        raise UserError(f"{path}: length_src must hold one whole number for each sample, got {_outline(lengths)}")
    for index, count in enumerate(counts):
        if isinstance(count, bool) or not isinstance(count, (int, float)) or not float(count).is_integer():
            shown = count if isinstance(count, (bool, int, float)) else _outline(count)
            raise UserError(
                f"{path}: length_src must hold one whole number for each sample, got {shown} at sample {index}; "
                "extract the file again"
            )
    return [int(count) for count in counts]


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _mapped(tensor: Layers) -> Tensor:
    """As a tensor that has its memory for itself: of a view of a batch, torch would save the whole batch."""
    if isinstance(tensor, StoredTensor):
        return tensor.mapped()
    if isinstance(tensor, (Scaled, MeanOfGroup)):
        return torch.stack([tensor[layer] for layer in range(tensor.shape[0])])
    assert isinstance(tensor, Tensor)
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def _outline(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        keys = [key[:20] if isinstance(key, str) else f"a {type(key).__name__}" for key in list(value)[:5]]
        return f"a dict with {', '.join(keys) or 'no keys'}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
