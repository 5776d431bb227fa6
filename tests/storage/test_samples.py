"""Files of queries and keys: the published form, and every way in which a file can be wrong, one clear line each."""

from __future__ import annotations

import bz2
import gzip
import lzma
import pickle
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scripts import split_by_length
from sparsefinder.errors import UserError
from sparsefinder.storage.held_out import training_samples, validation_samples
from sparsefinder.storage.samples import Samples, ShardWriter, join, load_samples
from sparsefinder.storage.store import Store
from sparsefinder.storage.tensor_files import StoredTensor


def content(lengths: tuple[int, ...] = (3, 5), layers: int = 2, heads: int = 2, size: int = 4) -> dict:
    q, k = ([torch.randn(layers, heads, n, size) for n in lengths] for _ in range(2))
    return {"length_src": list(lengths), "q": q, "k": k}


def test_reads_the_published_form(graph_files: Path) -> None:
    samples = load_samples(graph_files / "golden_enc-attn.pt")
    assert (len(samples), samples.shape, samples.lengths) == (5, (2, 3, 16), [24, 37, 61, 48, 61])
    assert samples.layer(1, 0).q.shape == (1, 3, 37, 16)


def test_writes_what_it_reads(tmp_path: Path) -> None:
    whole = content()
    Samples(whole["q"], whole["k"]).save(tmp_path / "a.pt")
    again = torch.load(tmp_path / "a.pt", weights_only=True)
    assert again["length_src"].tolist() == [3, 5]
    assert all(torch.equal(a, b) for a, b in zip(again["k"], whole["k"], strict=True))
    assert load_samples(tmp_path / "a.pt").lengths == [3, 5]


@pytest.mark.parametrize(
    "lengths",
    [
        torch.Tensor([3, 5]),  # as the published script builds it
        *(torch.tensor([3, 5], dtype=kind) for kind in (torch.float16, torch.float64, torch.int32, torch.uint8)),
        [3.0, 5],
        (torch.tensor(3), torch.tensor([5.0])),
    ],
    ids=lambda lengths: str(getattr(lengths, "dtype", type(lengths).__name__)),
)
def test_lengths_of_any_dtype_are_read(lengths: object, tmp_path: Path) -> None:
    torch.save(change("length_src", lengths), tmp_path / "a.pt")
    assert load_samples(tmp_path / "a.pt").lengths == [3, 5]


@pytest.mark.parametrize("trimmed", [False, True])
def test_views_of_a_batch_are_read_and_saved_without_the_batch(trimmed: bool, tmp_path: Path) -> None:
    """As the published scripts make them, of a whole batch, or without the padding that it has."""
    batch = torch.randn(2, 3, 2, 4, 16, 8)  # (side, sample, layer, head, token, head size)
    lengths = [16, 9, 12] if trimmed else [16] * 3
    q, k = ([sample[:, :, :n] for sample, n in zip(side, lengths, strict=True)] for side in batch)
    torch.save({"length_src": torch.tensor(lengths), "q": q, "k": k}, tmp_path / "views.pt")
    samples = load_samples(tmp_path / "views.pt")
    samples.part(1, 2).save(tmp_path / "one.pt")
    Samples(q[1:2], k[1:2]).save(tmp_path / "from_memory.pt")
    for file, first in (("views.pt", 0), ("one.pt", 1), ("from_memory.pt", 1)):
        again = load_samples(tmp_path / file)
        assert again.lengths == lengths[first : first + len(again)]
        for index in range(len(again)):
            for layer, qk in enumerate(again.layers(index)):
                assert torch.equal(qk.q[0], q[first + index][layer])
                assert torch.equal(qk.k[0], k[first + index][layer])
    own = 2 * q[1].nbytes
    for file in ("one.pt", "from_memory.pt"):
        assert own < (tmp_path / file).stat().st_size < own + 4000


def test_the_old_format_of_torch_loads(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load_samples(tmp_path / "old.pt").lengths == [3, 5]


def change(name: str, value: object) -> dict:
    return content() | {name: value}


WRONG = {
    "no dict": ([1, 2], "needs a dict"),
    "no lengths": ({"q": [], "k": []}, "length_src"),
    "no samples": ({"length_src": [], "q": [], "k": []}, "no sample"),
    "no list": (change("q", torch.zeros(2, 2)), "lists of tensors"),
    "more q than k": (change("k", content((3,))["k"]), "come in pairs"),
    "other shapes": (change("k", content((3, 4))["k"]), "but k of shape"),
    "length disagrees": (change("length_src", [3, 4]), "5 tokens"),
    "too few lengths": (change("length_src", [3]), "length_src disagrees"),
    "part of a token": (change("length_src", torch.tensor([3.0, 5.5])), "one whole number for each sample, got 5.5 at"),
    "length is no number": (change("length_src", [3.0, float("nan")]), "got nan at sample 1"),
    "length is true": (change("length_src", [3, True]), "got True at sample 1"),
    "length is text": (change("length_src", ["3", 5]), "got a str at sample 0"),
    "lengths in two axes": (change("length_src", torch.tensor([[3, 5]])), "got a torch.int64 tensor of shape"),
    "no floats": (change("q", [t.long() for t in content()["q"]]), "floating point"),
    "three axes": (change("q", [t[0] for t in content()["q"]]), "floating point tensor"),
    "other heads": (
        {"length_src": [3, 5], "q": [torch.zeros(2, 2, 3, 4), torch.zeros(2, 3, 5, 4)]}
        | {"k": [torch.zeros(2, 2, 3, 4), torch.zeros(2, 3, 5, 4)]},
        "sample 1 has 2 layers, 3 heads",
    ),
    "empty sample": ({"length_src": [0], "q": [torch.zeros(2, 2, 0, 4)], "k": [torch.zeros(2, 2, 0, 4)]}, "is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_one_clear_line(case: str, tmp_path: Path) -> None:
    value, message = WRONG[case]
    torch.save(value, tmp_path / "wrong.pt")
    with pytest.raises(UserError, match=message) as error:
        load_samples(tmp_path / "wrong.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_its_place(value: float, tmp_path: Path) -> None:
    wrong = content()
    wrong["q"][1][1, 0, 2, 3] = value
    torch.save(wrong, tmp_path / "nan.pt")
    samples = load_samples(tmp_path / "nan.pt")
    list(samples.layers(0))
    with pytest.raises(UserError, match="q of sample 1, layer 1 contains NaN"):
        list(samples.layers(1))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_samples(tmp_path / "missing.pt")


@pytest.mark.parametrize("module", [gzip, bz2, lzma], ids=["gzip", "bzip2", "xz"])
def test_a_compressed_file_is_called_that(module: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "qk.pt"
    path.write_bytes(module.compress(b"whatever"))
    program = {lzma: "xz", bz2: "bzip2", gzip: "gzip"}[module]
    with pytest.raises(UserError, match=rf"^{path} is compressed by {program}: unpack it first"):
        load_samples(path)


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:kept])
    with pytest.raises(UserError):
        load_samples(tmp_path / "cut.pt")


class Bomb:
    """Unpickling this would leave a trace."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_code_in_a_file_is_refused_and_never_run(plain_pickle: bool, tmp_path: Path) -> None:
    trace, file = tmp_path / "trace", tmp_path / "evil.pt"
    if plain_pickle:
        file.write_bytes(pickle.dumps(Bomb(str(trace))))
    else:
        torch.save({"length_src": [1], "q": Bomb(str(trace)), "k": []}, file)
    with pytest.raises(UserError, match="refused"):
        load_samples(file)
    assert not trace.exists()


class TestHeldOut:
    def test_a_file_given_alone_holds_out_its_last_tenth(self, tmp_path: Path) -> None:
        torch.save(content(tuple(range(3, 23))), tmp_path / "a.pt")
        store = Store(tmp_path / "run", {"qk": tmp_path / "a.pt"})
        assert training_samples(store).lengths == list(range(3, 21))
        assert validation_samples(store).lengths == [21, 22]

    def test_files_given_together_are_used_whole(self, tmp_path: Path) -> None:
        torch.save(content(), tmp_path / "a.pt")
        store = Store(tmp_path / "run", {"qk": tmp_path / "a.pt", "qk_validation": tmp_path / "a.pt"})
        assert training_samples(store).lengths == validation_samples(store).lengths == [3, 5]

    def test_one_sample_cannot_be_split(self, tmp_path: Path) -> None:
        torch.save(content((3,)), tmp_path / "a.pt")
        store = Store(tmp_path / "run", {"qk": tmp_path / "a.pt"})
        assert validation_samples(store).lengths == [3]
        with pytest.raises(UserError, match="2 samples or more"):
            training_samples(store)


class TestQueryScale:
    def write(self, path: Path, divided: float = 1.0, tokens: int = 40) -> Path:
        generator = torch.Generator().manual_seed(0)
        q, k = 2 * torch.randn(2, 2, 2, tokens, 64, generator=generator)
        torch.save({"length_src": [tokens] * 2, "q": [q / divided] * 2, "k": [k] * 2}, path)
        return path

    @pytest.mark.parametrize("scale", ["sqrt_d", 8, 8.0])
    def test_queries_of_files_given_by_path_are_multiplied(self, scale: float | str, tmp_path: Path) -> None:
        right, divided = self.write(tmp_path / "a.pt"), self.write(tmp_path / "b.pt", 8.0)
        plain, scaled = Store(tmp_path, {"qk": right}), Store(tmp_path, {"qk": divided}, query_scale=scale)
        for take in (training_samples, validation_samples):
            for a, b in zip(take(plain).layers(0), take(scaled).layers(0), strict=True):
                assert torch.allclose(a.q, b.q)
                assert torch.equal(a.k, b.k)
        validation_samples(scaled).save(tmp_path / "saved.pt")
        assert torch.allclose(load_samples(tmp_path / "saved.pt").q[0][1], torch.load(right)["q"][0][1])

    def test_it_is_part_of_what_a_stage_was_made_from(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "a.pt")
        given = {"qk": file, "qk_validation": file}
        contents = {Store(tmp_path, given, query_scale=scale).content("qk") for scale in (None, 8.0, "sqrt_d")}
        assert len(contents) == 3

    @pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), True, "sqrt", [8]])
    def test_a_wrong_one(self, scale: object, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"query_scale=.*: give a positive number"):
            Store(tmp_path, {"qk": tmp_path}, query_scale=scale)  # type: ignore[arg-type]

    def test_it_is_not_for_what_the_run_makes_itself(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="give qk=PATH"):
            Store(tmp_path, {"projections": tmp_path}, query_scale=8.0)

    @pytest.mark.parametrize(("divided", "tokens", "warned"), [(1.0, 40, 0), (64.0, 40, 1), (64.0, 15, 0)])
    def test_a_density_that_cannot_be_names_it_once(
        self, divided: float, tokens: int, warned: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = Store(tmp_path, {"qk": self.write(tmp_path / "a.pt", divided, tokens)})
        training_samples(store)
        validation_samples(store)
        said = [record.getMessage() for record in caplog.records if "query_scale=sqrt_d" in record.getMessage()]
        assert len(said) == warned
        assert all("of the pairs of sample 0 are gold" in line for line in said)


class TestSplitByLength:
    def test_each_sample_lies_in_one_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        whole = content((3, 9, 10, 20, 14, 40, 25))
        torch.save(whole, tmp_path / "a.pt")
        assert (
            split_by_length.main([str(tmp_path / "a.pt"), str(tmp_path / "b"), "--lengths", "9", "20", "30", "35"]) == 0
        )
        assert sorted(path.name for path in tmp_path.glob("*")) == ["a.pt", "b-20-30.pt", "b-35-up.pt", "b-9-20.pt"]
        assert "b-9-20.pt: 3 samples" in capsys.readouterr().out
        for name, places in (("9-20", [1, 2, 4]), ("20-30", [3, 6]), ("35-up", [5])):
            part = load_samples(tmp_path / f"b-{name}.pt")
            assert len(part) == len(places)
            for index, place in enumerate(places):
                assert torch.equal(part.q[index][1], whole["q"][place][1])
                assert torch.equal(part.k[index][0], whole["k"][place][0])

    @pytest.mark.parametrize(
        ("lengths", "out", "message"),
        [
            (["20", "10"], "b", "give numbers of tokens that rise"),
            (["-1", "10"], "b", "give numbers of tokens that rise"),
            (["99"], "b", "has no sample of 99 tokens or more: its longest has 5"),
            (["1"], "missing/b", "cannot write"),
        ],
    )
    def test_wrong_input(
        self, lengths: list[str], out: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save(content(), tmp_path / "a.pt")
        assert split_by_length.main([str(tmp_path / "a.pt"), str(tmp_path / out), "--lengths", *lengths]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class TestFolders:
    def write(self, folder: Path, whole: dict, size: int) -> Path:
        folder.mkdir()
        writer = ShardWriter(folder, "0000-", size)
        for q, k in zip(whole["q"], whole["k"], strict=True):
            writer.add(q, k)
        writer.close()
        return folder

    @pytest.mark.parametrize(("size", "files"), [(0, 5), (700, 3), (1 << 20, 1)])
    def test_a_folder_of_files_is_their_samples_in_order(self, size: int, files: int, tmp_path: Path) -> None:
        whole = content((3, 5, 4, 6, 2))
        folder = self.write(tmp_path / "many", whole, size)
        assert len(list(folder.iterdir())) == files
        samples = load_samples(folder)
        assert (samples.lengths, samples.shape) == ([3, 5, 4, 6, 2], (2, 2, 4))
        for index in range(5):
            for layer in range(2):
                assert torch.equal(samples.layer(index, layer).k[0], whole["k"][index][layer])

    def test_joined_it_is_the_published_file(self, tmp_path: Path) -> None:
        whole = content((3, 5, 4))
        join(self.write(tmp_path / "many", whole, 0), tmp_path / "joined.pt")
        Samples(whole["q"], whole["k"]).save(tmp_path / "at_once.pt")
        assert (tmp_path / "joined.pt").read_bytes() == (tmp_path / "at_once.pt").read_bytes()

    def test_files_of_different_models(self, tmp_path: Path) -> None:
        folder = self.write(tmp_path / "many", content((3,)), 0)
        torch.save(content((3,), heads=3), folder / "1.pt")
        with pytest.raises(UserError, match="were not recorded together"):
            load_samples(folder)

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="this one has none"):
            load_samples(tmp_path)


def test_a_layer_is_read_from_its_place(tmp_path: Path) -> None:
    """Views and shared tensors too; and a file that was replaced is noticed."""
    base = torch.randn(3, 2, 4, 8)
    shared = {"length_src": [4, 4], "q": [base[:2], base[1:]], "k": [base[1:], torch.randn(2, 2, 4, 8)]}
    torch.save(shared, tmp_path / "a.pt")
    samples = load_samples(tmp_path / "a.pt")
    assert all(isinstance(tensor, StoredTensor) for tensor in samples.q)
    for index in range(2):
        for layer in range(2):
            assert torch.equal(samples.q[index][layer], shared["q"][index][layer])
            assert torch.equal(samples.k[index][layer], shared["k"][index][layer])
    torch.save(shared, tmp_path / "a.pt")
    with pytest.raises(UserError, match="was replaced while it was being read"):
        samples.layer(0, 0)
