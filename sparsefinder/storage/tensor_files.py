"""Files of tensors from anybody, read without trust: nothing is executed, nothing is larger than its file says.

A file of `torch.save` is a zip archive of a pickle and of the bytes of each tensor. `load_tensors` lets torch read the pickle
(``weights_only``: no code), after a look at the archive: a compressed entry, a giant pickle, or a tensor that claims more than
the file holds would fill the memory. `stored` then turns tensors into positions in the file, from which `StoredTensor` reads
one layer at a time. Reading by position, not by a map of the file into memory, keeps the memory of a process small however
much it has read, and makes an error, not a crash, of a file that is replaced or cut while it is read.
"""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.storage.files import compression_of

_LARGEST_PICKLE = 64 << 20  # bytes of the structure around the tensors; that of a million samples has less
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_COPIES = 8  # times that a file's tensors together may exceed it: shared tensors are saved once


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; ``tensor[i]`` reads its part ``i`` along the first axis.

    Args:
        path: The file.
        offset: Byte at which the tensor begins.
        shape: Of the whole tensor.
        dtype: Of its numbers.
        identity: Of the file that was opened, so that another one under its name is noticed.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    identity: tuple[int, ...]

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"part {index} of {self.shape[0]}")
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        data = bytearray(size)
        try:
            with self.path.open("rb", buffering=0) as file:
                same = _identity(file.fileno()) == self.identity
                file.seek(self.offset + index * size)
                count = file.readinto(data)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read any more: {error.strerror}") from error
        if not same or count != size:
            raise UserError(f"{self.path} was replaced while it was being read; run the stage again")
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape[1:])

    def mapped(self) -> Tensor:
        """All of it, mapped into memory, to be written elsewhere. A file that is cut meanwhile crashes the process."""
        size = math.prod(self.shape)
        whole = torch.UntypedStorage.from_file(str(self.path), False, self.offset + size * self.dtype.itemsize)
        return torch.empty(0, dtype=self.dtype).set_(whole[self.offset :]).view(self.shape)


def save_tensors(content: Any, path: Path | str) -> None:
    """`torch.save`, the same bytes for the same content: given a path, torch would write its name into the file."""
    path = Path(path)
    with path.open("wb") as file:
        torch.save(content, file)


def load_tensors(path: Path | str, what: str) -> Any:
    """The content of a file of `torch.save`, its tensors mapped, not read.

    Args:
        path: The file.
        what: What it should hold, for messages.

    Raises:
        UserError: Whatever is wrong with it, in one line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file of {what}")
    try:
        with path.open("rb") as file:
            program = compression_of(file.read(6))
        if program:
            raise UserError(f"{path} is compressed by {program}: unpack it first, so that it can be read in parts")
        archive = zipfile.is_zipfile(path)
        if archive:
            _check_archive(path, what)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice about damaged files is not for users
            content = torch.load(path, weights_only=True, map_location="cpu", mmap=archive)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises anything: KeyError, AttributeError, struct.error, …
        raise UserError(
            f"{path}: refused, it cannot be read as {what}: truncated, damaged, not saved by torch.save, or in need of code "
            "to load; make it again, of tensors, lists and dicts only"
        ) from error
    _check_sizes(path, content, what)
    if archive:
        _offsets(path, content)
    return content


def stored(path: Path | str, content: Any, tensors: Sequence[Tensor]) -> Sequence[Tensor | StoredTensor]:
    """Where tensors lie in a file.

    Args:
        path: The file.
        content: What `load_tensors` gave.
        tensors: Some of its tensors.

    Returns:
        Their positions. Tensors without a position, as in files of old versions of torch, stay as they are.
    """
    path = Path(path)
    if not zipfile.is_zipfile(path) or not all(tensor.is_contiguous() for tensor in tensors):
        return tensors
    offsets = _offsets(path, content)
    with path.open("rb") as file:
        identity = _identity(file.fileno())
    return [
        StoredTensor(
            path,
            offsets[t.untyped_storage().data_ptr()] + int(t.storage_offset()) * t.itemsize,
            tuple(t.shape),
            t.dtype,
            identity,
        )
        for t in tensors
    ]


def _identity(handle: int) -> tuple[int, ...]:
    status = os.fstat(handle)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _offsets(path: Path, content: Any) -> dict[int, int]:
    """Where each storage (by its address) begins in an archive. A `UserError` where its entry is not all there.

    torch maps the file as a whole, and does not look whether an entry is as long as its tensor. Storages lie in memory as
    their entries lie in the file, at one and the same distance; where they do not, entries were taken out or put in.
    """
    reader: Any = torch._C.PyTorchFileReader(str(path))
    with zipfile.ZipFile(path) as archive:  # names begin with that of the archive, which torch leaves out
        entries = {entry.filename.partition("/")[2]: entry.file_size for entry in archive.infolist()}
    sizes = {
        reader.get_record_offset(name): entries[name] for name in reader.get_all_records() if name.startswith("data/")
    }
    storages = {s.data_ptr(): s.nbytes() for tensor in _tensors(content) for s in (tensor.untyped_storage(),)}
    offsets, addresses = sorted(sizes), sorted(storages)
    same = len(offsets) == len(addresses) and len({a - o for a, o in zip(addresses, offsets, strict=True)}) <= 1
    if not same or any(storages[a] > sizes[o] for a, o in zip(addresses, offsets, strict=True)):
        raise UserError(f"{path} is damaged: its tensors are not where its list of tensors says; make it again")
    return dict(zip(addresses, offsets, strict=True))


def _check_archive(path: Path, what: str) -> None:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > path.stat().st_size:
                raise UserError(
                    f"{path}: refused, {entry.filename[:80]!r} is compressed; {what} are saved by torch.save"
                )
            if entry.filename.endswith(".pkl") and entry.file_size > _LARGEST_PICKLE:
                raise UserError(f"{path}: refused, its list of tensors has {entry.file_size >> 20} MiB")


def _check_sizes(path: Path, content: Any, what: str) -> None:
    size = path.stat().st_size
    total = 0
    for tensor in _tensors(content):
        if (
            tensor.device.type != "cpu"
            or tensor.layout != torch.strided
            or type(tensor) not in (Tensor, torch.nn.Parameter)
        ):
            raise UserError(
                f"{path}: {what} must be plain dense tensors, got one that is {tensor.layout}, {tensor.device}"
            )
        if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            raise UserError(f"{path}: {what} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        bytes_ = tensor.numel() * tensor.itemsize
        total += bytes_
        if bytes_ > size or total > _MOST_COPIES * size:
            raise UserError(f"{path}: refused, a tensor of shape {tuple(tensor.shape)} is larger than the file")


def _tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in lists, tuples and dicts; no container is looked into twice, so one that holds itself does no harm."""
    pending, seen = [content], set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            if id(value) in seen:
                continue
            seen.add(id(value))
            pending.extend(value.values() if isinstance(value, dict) else value)
