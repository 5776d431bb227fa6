"""Hundreds of damaged and hostile files: each ends in one clear line, or in the right answer; none executes, hangs or fills."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from sparsefinder import report
from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Learned
from sparsefinder.predictors.centroids import load_centroids
from sparsefinder.predictors.projections import load_projections
from sparsefinder.score import ScoreSettings, score
from sparsefinder.storage import tables
from sparsefinder.storage.manifests import content_hash, manifest_path, read_manifest
from sparsefinder.storage.samples import load_samples
from sparsefinder.storage.store import ARTEFACTS, Store
from tests.small_runs import CONFIGURATIONS, make_scored

LEARNED = tuple(c for c in CONFIGURATIONS if c.name in ("kmeans", "quantize", "oracle"))[:4]
READ = ("qk", "projections", "centroids")
COPIES = int(os.environ.get("SPARSEFINDER_KILLS", "10")) // 10  # ten times as many in the full form


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with everything that can be made without a model."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    make_scored(run_dir, LEARNED)
    return run_dir


class Hangs(BaseException):
    """No `Exception`, which would be taken for that of a file."""


@pytest.fixture(autouse=True)
def _small_and_quick() -> Iterator[None]:
    """Each test within half a minute and half a gigabyte more than the one before it."""

    def late(*_: object) -> None:
        raise Hangs

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, late)
    signal.alarm(30 * COPIES)
    yield
    signal.alarm(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


# ---- what may come ----


class Bomb:
    """Unpickling this would leave a trace."""

    def __init__(self, trace: str):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.trace,)


def damaged_bytes(data: bytes, chance: random.Random) -> Iterator[tuple[str, bytes]]:
    """Truncated, flipped, cut out, repeated, overwritten."""
    for _ in range(8 * COPIES):
        yield "truncated", data[: chance.randrange(len(data))]
    for _ in range(25 * COPIES):
        place = chance.choice(
            (
                chance.randrange(len(data)),
                chance.randrange(min(len(data), 1500)),
                -1 - chance.randrange(min(len(data), 500)),
            )
        )
        flipped = bytearray(data)
        flipped[place] ^= 1 << chance.randrange(8)
        yield "flipped", bytes(flipped)
    for _ in range(8 * COPIES):
        start, length = chance.randrange(len(data)), chance.randrange(1, 200)
        yield "cut out", data[:start] + data[start + length :]
        yield "repeated", data[: start + length] + data[start:]
        yield "noise", data[:start] + chance.randbytes(length) + data[start + length :]
    yield from (("empty", b""), ("text", b"hello\n"), ("zeros", bytes(10_000)), ("zip end only", data[-22:]))


def paths_of(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every list, dict and tensor in ``content``."""
    yield at
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield from paths_of(value, (*at, key))


def changed(content: Any, at: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """``content`` with ``change`` applied at one place."""
    if not at:
        return change(content)
    copy = content.copy()
    copy[at[0]] = changed(content[at[0]], at[1:], change)
    return copy


def cyclic() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


CHANGES: dict[str, Callable[[Any], Any]] = {
    "none": lambda value: None,
    "number": lambda value: 3,
    "text": lambda value: "x" * 100_000,
    "empty list": lambda value: [],
    "empty dict": lambda value: {},
    "list of itself": lambda value: cyclic(),
    "nested": lambda value: [value],
    "doubled": lambda value: value + value if isinstance(value, list) else value,
    "shortened": lambda value: value[:-1] if isinstance(value, (list, torch.Tensor)) else value,
    "reversed": lambda value: value[::-1] if isinstance(value, list) else value,
    "same throughout": lambda value: [value[0]] * 5000 if isinstance(value, list) and value else value,
    "more keys": lambda value: {**value, "other": 1} if isinstance(value, dict) else value,
    "odd keys": lambda value: {(1, 2): 3, b"x": value},
    "nan": lambda value: tensor(value, lambda t: t * torch.nan),
    "inf": lambda value: tensor(value, lambda t: t + torch.inf),
    "large": lambda value: tensor(value, lambda t: t.double() * 1e200),
    "half": lambda value: tensor(value, lambda t: t.half()),
    "bfloat16": lambda value: tensor(value, lambda t: t.bfloat16()),
    "float8": lambda value: tensor(value, lambda t: t.to(torch.float8_e4m3fn)),
    "complex": lambda value: tensor(value, lambda t: t.to(torch.complex64)),
    "whole numbers": lambda value: tensor(value, lambda t: t.long()),
    "truth values": lambda value: tensor(value, lambda t: t > 0),
    "transposed": lambda value: tensor(value, lambda t: t.transpose(0, -1)),
    "flat": lambda value: tensor(value, lambda t: t.flatten()),
    "no dimension": lambda value: tensor(value, lambda t: t.sum()),
    "without content": lambda value: tensor(value, lambda t: t[:0]),
    "last axis empty": lambda value: tensor(value, lambda t: t[..., :0]),
    "one more axis": lambda value: tensor(value, lambda t: t[None]),
    "twice as many heads": lambda value: tensor(value, lambda t: torch.cat([t, t], min(1, max(0, t.ndim - 3)))),
    "huge and empty inside": lambda value: tensor(value, lambda t: t.flatten()[:1].expand(1 << 20, 1 << 10, 1 << 10, 1)),
    "sparse": lambda value: tensor(value, lambda t: torch.zeros(2, 2, 3, 4).to_sparse()),
    "sparse and huge": lambda value: torch.sparse_coo_tensor(torch.zeros(4, 1).long(), [1.0], (1 << 15,) * 4),
    "meta": lambda value: tensor(value, lambda t: torch.empty(1 << 15, 1 << 15, 1 << 15, 1, device="meta")),
    "long": lambda value: tensor(value, lambda t: torch.zeros(1, 1, 1 << 19, 1)),
}  # fmt: skip


def tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` changed where it is a tensor; a tensor in place of a container."""
    return change(value if isinstance(value, torch.Tensor) else torch.ones(2, 2, 3, 4))


def hostile(data: bytes, content: Any, trace: Path) -> Iterator[tuple[str, bytes]]:
    """Files made to do harm: code, bombs, links."""
    bomb = Bomb(str(trace))
    yield "plain pickle of code", pickle.dumps(bomb)
    yield "code beside tensors", saved([content, bomb])
    yield "code in the old format", saved(bomb, old=True)
    yield "plain pickle", pickle.dumps({"length_src": [1], "q": [], "k": []})
    yield "old format", saved(content, old=True)
    yield "zip bomb", zipped({"archive/data.pkl": b"\x00" * (1 << 26), "archive/version": b"3"})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    yield "compressed", zipped(entries)
    for name in entries:
        yield "entry missing", zipped({n: e for n, e in entries.items() if n != name}, zipfile.ZIP_STORED)
        yield "entry empty", zipped({**entries, name: b""}, zipfile.ZIP_STORED)
        yield "entry longer", zipped({**entries, name: entries[name] * 3}, zipfile.ZIP_STORED)
    yield (
        "more entries",
        zipped({**entries, **{f"archive/data/{i}": b"x" for i in range(90, 2000)}}, zipfile.ZIP_STORED),
    )
    elements = re.compile(rb"(cpuq.)(?:K.|M..)", re.DOTALL)  # of a storage, in the pickle
    huge = elements.sub(lambda found: found[1] + b"J\xff\xff\xff\x7f", saved(content, old=True))
    yield "claims to be huge in the old format", huge


def saved(content: Any, old: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not old)
    return buffer.getvalue()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


# ---- what must follow ----


def use(files: dict[str, Path]) -> bool:
    """Measure patterns with these files, as ``score`` does; whether every number of it is finite."""
    samples = load_samples(files["qk"]).part(0, 2)
    projections, centroids = load_projections(files["projections"]), load_centroids(files["centroids"])
    projections.check(*samples.shape)
    learned = Learned({"projections": projections, "centroids": centroids})
    counts = score(samples, ScoreSettings(LEARNED), learned).counts.values()
    return all(bool((each.allowed > 0).all()) and bool(each.mass.isfinite().all()) for each in counts)


def one_line_or_right(act: Callable[[], bool], what: str) -> bool:
    """Whether ``act`` was refused with one clear line; anything but that or success fails the test."""
    try:
        right = act()
    except UserError as error:
        message = str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    else:
        assert right, f"{what}: wrong numbers"
        return False
    assert "\n" not in message, what
    assert 20 < len(message) < 1000, (what, message[:2000])
    return True


@pytest.mark.parametrize("name", READ)
def test_damaged_tensors(name: str, whole: Path, tmp_path: Path) -> None:
    """By path: one line or numbers. In a run directory: other bytes than were written are never read."""
    good = {each: whole / ARTEFACTS[each].path for each in READ}
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    inside = run_dir / ARTEFACTS[name].path
    data = inside.read_bytes()
    cases = refused = 0
    for what, other in damaged_bytes(data, random.Random(name)):
        inside.write_bytes(other)
        refused += one_line_or_right(lambda: use(good | {name: inside}), f"{name}: {what}")
        cases += 1
        if other != data:
            with pytest.raises(UserError, match="is not what stage="):
                Store(run_dir).content(name)
    assert cases > 55 * COPIES
    assert refused > cases / 4


@pytest.mark.parametrize("name", READ)
def test_other_content(name: str, whole: Path, tmp_path: Path) -> None:
    good = {each: whole / ARTEFACTS[each].path for each in READ}
    content = torch.load(good[name], weights_only=True)
    if name == "qk":
        content["length_src"] = content["length_src"].tolist()
    places = list(paths_of(content))
    chance = random.Random(name)
    file = tmp_path / "changed"
    cases = refused = 0
    for what, change in CHANGES.items():
        for at in {(), *chance.sample(places, min(len(places), 3 * COPIES))}:
            torch.save(changed(content, at, change), file)
            refused += one_line_or_right(lambda: use(good | {name: file}), f"{name}: {what} at {at}")
            cases += 1
    assert cases >= len(CHANGES) * min(len(places), 3)
    assert refused > cases / 2


@pytest.mark.parametrize("name", READ)
def test_hostile_files(name: str, whole: Path, tmp_path: Path) -> None:
    good = {each: whole / ARTEFACTS[each].path for each in READ}
    file, trace = tmp_path / "hostile", tmp_path / "trace"
    data = good[name].read_bytes()
    right = {"old format"}
    for what, other in hostile(data, torch.load(good[name], weights_only=True), trace):
        file.write_bytes(other)
        refused = one_line_or_right(lambda: use(good | {name: file}), f"{name}: {what}")
        assert refused or what in right | {"entry longer", "entry missing", "entry empty"}, what
        assert not trace.exists()


@pytest.mark.parametrize("name", READ)
def test_links_and_odd_files(name: str, whole: Path, tmp_path: Path) -> None:
    """A link to a good file is that file; pipes, devices, folders and loops are refused at once."""
    odd = tmp_path / "odd"
    odd.symlink_to(whole / ARTEFACTS[name].path)
    assert Store(tmp_path, {name: odd}).content(name) == content_hash(whole / ARTEFACTS[name].path)
    good = {each: whole / ARTEFACTS[each].path for each in READ}
    assert not one_line_or_right(lambda: use(good | {name: odd}), "link")
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to("/dev/zero")):
        odd.unlink(missing_ok=True)
        make(odd)
        assert one_line_or_right(lambda: use({**good, name: Store(tmp_path, {name: odd}).path(name)}), "odd file")
        if odd.is_dir():
            odd.rmdir()


def test_damaged_manifests(whole: Path, tmp_path: Path) -> None:
    """A manifest that was changed is none: the artefact is made again."""
    artefact = tmp_path / "projections.pickle"
    shutil.copy(whole / "projections.pickle", artefact)
    file = manifest_path(artefact)
    text = manifest_path(whole / "projections.pickle").read_text()
    file.write_text(text)
    good = read_manifest(artefact)
    assert good is not None
    content, chance = json.loads(text), random.Random(0)
    others = [data for _, data in damaged_bytes(text.encode(), chance)]
    for at in paths_of(content):
        others += [json.dumps(changed(content, at, lambda _, new=new: new)).encode() for new in (None, -1, [], {}, "x")]
    others += [b"[" * 100_000, b'{"a":' * 50_000, text.replace('": ', '": 1e999').encode(), b"\xff" * 100]
    for data in others:
        file.write_bytes(data)
        found = read_manifest(artefact)
        assert found is None or found == good  # the same but for spaces
    with file.open("wb") as handle:
        handle.truncate(1 << 40)
    assert read_manifest(artefact) is None


def test_damaged_tables(whole: Path, tmp_path: Path) -> None:
    """No number is reported from tables that are not those that were written."""
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    chance = random.Random(0)
    assert report.summary(Store(run_dir))
    for name in ("metrics.parquet", "metrics.csv", "counts.parquet", "maps.safetensors"):
        file = run_dir / "score" / name
        data = file.read_bytes()
        for what, other in list(damaged_bytes(data, chance))[:: 4 * COPIES]:
            file.write_bytes(other)
            if other == data:
                continue
            for read in (lambda: report.Results.read(Store(run_dir)), lambda: tables.collect(run_dir)):
                with pytest.raises(UserError, match="is not what stage=score wrote"):
                    read()
            assert what
        file.write_bytes(data)
    (run_dir / "score" / "more.csv").symlink_to("/etc/hostname")  # a link out of the folder
    with pytest.raises(UserError, match="is not what stage=score wrote"):
        tables.collect(run_dir)
    (run_dir / "score" / "more.csv").unlink()
    pd.testing.assert_frame_equal(tables.collect(run_dir), tables.collect(whole))


def test_odd_locks(tmp_path: Path) -> None:
    """The files of a lock can hold anything; what they point to is never written."""
    lock, holder, other = tmp_path / ".lock", tmp_path / ".lock-holder", tmp_path / "precious"
    for data in (b"", b"\xff\xfe" * 1000, b"process\n1\n" * 100_000):
        lock.write_bytes(data)
        with Store(tmp_path).held():
            with pytest.raises(UserError, match=f"is in use by process {os.getpid()} on"), Store(tmp_path).held():
                pass
            holder.write_bytes(data)  # of a holder that was killed while it wrote, or of another program
            with (
                pytest.raises(UserError, match="is in use by") as error,
                Store(tmp_path).held(),
            ):
                pass
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    other.write_text("precious")
    holder.symlink_to(other)
    with Store(tmp_path).held():
        assert other.read_text() == "precious"
    assert not holder.is_symlink()
    lock.unlink()
    lock.symlink_to(other)
    with pytest.raises(UserError, match="cannot write in"), Store(tmp_path).held():
        pass
    assert other.read_text() == "precious"
    lock.unlink()
    lock.mkdir()
    with pytest.raises(UserError, match="cannot write in"), Store(tmp_path).held():
        pass
