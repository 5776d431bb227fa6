"""Corpora: what counts as prose, who is held out, which tokens come in which block, and what is masked."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import itertools
import json
import math
import random
import re
import time

import pytest
import torch
from tiny_models import tiny_tokenizer

from sparsefinder.corpora import (
    AnyDataset,
    Docstrings,
    Masking,
    TextFiles,
    WikiText103,
    files,
    masked_batches,
    token_blocks,
    train_tokenizer,
    vocabulary,
)
from sparsefinder.corpora import docstrings as docstrings_module
from sparsefinder.corpora.documents import split_documents
from sparsefinder.corpora.prose import docstrings, is_prose, paragraphs
from sparsefinder.errors import UserError
from sparsefinder.storage import hub

# ---- prose ----

NUMPY_STYLE = """
    Evaluate a piecewise-defined function at :math:`x` with ``numpy``.

    Each function is evaluated on the *input* wherever its condition is true,
    see :func:`~numpy.select` and `the guide <https://numpy.org>`_ [1]_.

    Parameters
    ----------
    x : ndarray, shape (n,)
        The domain over which the function is evaluated.
    condlist : list of bool arrays
        Each boolean array corresponds to a function. Wherever it is true,
        the function is used as the output value.

    .. versionadded:: 1.2
        Scalars are accepted for the first two of the arguments too.

    .. math::
        f(x) = \\sum_i x_i which reads like a sentence but is a formula.

    Examples
    --------
    Define the sign function, which is one for positive arguments::

        x = np.linspace(-2.5, 2.5, 6), Indented Code That Reads Like Prose.

    >>> np.piecewise(x, [x < 0, x >= 0], [-1, 1])
    array([-1., -1., -1.,  1.,  1.,  1.]) This line is output and not prose.

    ===========  ==========================================
    name         This table has a sentence that is not prose.
    ===========  ==========================================
"""
MARKDOWN_STYLE = """
    Loads the weights of a [pretrained model](https://x.org) from the hub.

    Args:
        name_or_path (`str`, *optional*, defaults to `"base"`):
            The name of the repository, or the path of a folder on this machine.
        force (`bool`): Whether the files should be downloaded again in any case.

    ```python
    This block of code has words, Like A Sentence would have, but it is fenced.
    ```
    - The first item of a list goes on
      in the second line of the item.
"""


def test_prose_of_a_docstring_in_numpy_style():
    assert list(paragraphs(NUMPY_STYLE)) == [
        "Evaluate a piecewise-defined function at x with numpy.",
        "Each function is evaluated on the input wherever its condition is true, see select and the guide.",
        "The domain over which the function is evaluated.",
        "Each boolean array corresponds to a function. Wherever it is true, the function is used as the output value.",
        "Scalars are accepted for the first two of the arguments too.",
        "Define the sign function, which is one for positive arguments:",
    ]


def test_prose_of_a_docstring_in_markdown_style():
    assert list(paragraphs(MARKDOWN_STYLE)) == [
        "Loads the weights of a pretrained model from the hub.",
        "The name of the repository, or the path of a folder on this machine.",
        "Whether the files should be downloaded again in any case.",
        "The first item of a list goes on in the second line of the item.",
    ]


@pytest.mark.parametrize(
    "text",
    ["Too short.", "no capital letter begins this paragraph of words.", "x = f(y) + g(z) == 3 for all of the cases.",
     "Returns_the_value_of_an_identifier_that_is_long.", "See https://example.org for the rest of the story."],
)  # fmt: skip
def test_what_is_no_prose(text):
    assert not is_prose(text)


def test_docstrings_are_found_without_executing_anything():
    source = '''"""Of the module."""
raise SystemExit("executed")
class A:
    """Of the class."""
    def f(self):
        """Of the method."""
        class Inner:
            """Of an inner class."""
        "not a docstring"
if True:
    async def g():
        """Of a coroutine."""
attach.add_docstr(f, r"""Attached.""".format(**x))
print("printed")
topics = {"a": "%s", "b": 3, "c": "short"}
''' % ("t" * 300)
    assert list(docstrings(source)) == [
        "Of the module.", "Of the class.", "Of the method.", "Of an inner class.", "Of a coroutine.", "Attached.", "t" * 300,
    ]  # fmt: skip


# ---- the docstrings corpus ----

SMALL = Docstrings(train=["click", "no-such-package", "python"], validation=["joblib"], test=["rich"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus")


def test_docstrings_are_deterministic_cached_and_held_out(cache, monkeypatch, caplog):
    fresh = docstrings_module._collect(SMALL)
    assert "no-such-package is not installed" in caplog.text
    splits = {split: list(SMALL.documents(split, cache)) for split in ("train", "validation", "test")}
    assert splits == {split: [document for _, document in found] for split, found in fresh.items()}
    assert {package for package, _ in SMALL.by_package("train", cache)} == {"click", "python"}
    monkeypatch.setattr(docstrings_module, "_collect", lambda corpus: pytest.fail("read again"))
    assert list(SMALL.documents("test", cache)) == splits["test"]
    lines = {split: {line for document in found for line in document.split("\n")} for split, found in splits.items()}
    assert not lines["train"] & (lines["validation"] | lines["test"])
    assert sum(map(len, splits["train"])) > 100_000
    assert all(is_prose(line) for found in lines.values() for line in found)


def test_documents_of_whole_packages_hold_their_modules_in_order():
    modules = [
        ("one", "one/__init__.py", "a"), ("one", "one/inner/__init__.py", "b"), ("one", "one/inner/deep/x.py", "c"),
        ("one", "one/module.py", "d"), ("one", "beside.py", "e"), ("two", "two/__init__.py", "f"),
    ]  # fmt: skip
    found = {
        unit: list(
            docstrings_module._joined(
                (docstrings_module._document_of(name, path, unit), text) for name, path, text in modules
            )
        )
        for unit in docstrings_module.UNITS
    }
    assert found["module"] == [(name, text) for name, _, text in modules]
    assert found["package"] == [("one", "a\nd"), ("one", "b\nc"), ("one", "e"), ("two", "f")]
    assert found["distribution"] == [("one", "a\nb\nc\nd\ne"), ("two", "f")]


def test_whole_packages_fill_long_blocks(cache, caplog):
    """The same words, and blocks that are full."""
    caplog.set_level("INFO")
    whole = dataclasses.replace(SMALL, document="distribution")
    tokenizer = train_tokenizer(SMALL.documents("train", cache), 300, 512)
    shares = {}
    for corpus in (SMALL, whole):
        blocks = token_blocks(corpus, tokenizer, "train", 4096)
        shares[corpus.document] = float((blocks.lengths == 4096).double().mean())
        assert f"{100 * shares[corpus.document]:.0f} % of the blocks are full" in caplog.text
    assert shares["module"] < 0.9 < shares["distribution"]
    words = ["\n".join(corpus.documents("train", cache)).split() for corpus in (SMALL, whole)]
    assert words[0] == words[1]
    assert whole.fingerprint() != SMALL.fingerprint()


def test_repeated_paragraphs_are_kept_once():
    repetitions = docstrings_module._Repetitions()
    base = "If set, the model returns the hidden states of all its layers as one tuple of tensors for the caller."
    assert repetitions.new(base)
    assert not repetitions.new(base)
    assert not repetitions.new(base.replace("the caller", "you"))
    assert repetitions.new("A sentence about something else, which nobody has written down before this test.")


def test_a_document_may_say_again_what_it_said_itself():
    """``again`` names the document: there a paragraph may return, in no other."""
    repetitions = docstrings_module._Repetitions()
    base = "If set, the model returns the hidden states of all its layers as one tuple of tensors for the caller."
    assert repetitions.new(base, ("first",))
    assert repetitions.new(base, ("first",))
    assert not repetitions.new(base, ("second",))
    assert not repetitions.new(base)


def test_long_documents_with_what_they_repeat(cache):
    """More text in every split, and still nothing of the training part in the others."""
    once = Docstrings(SMALL.train, SMALL.validation, SMALL.test, document="distribution", max_characters=60_000)
    again = dataclasses.replace(once, new_in="document")
    found = {corpus.new_in: docstrings_module._collect(corpus) for corpus in (once, again)}
    paragraphs = {
        name: {split: "\n".join(text for _, text in documents).split("\n") for split, documents in splits.items()}
        for name, splits in found.items()
    }
    assert len(set(paragraphs["corpus"]["train"])) == len(paragraphs["corpus"]["train"])
    assert len(set(paragraphs["document"]["train"])) < len(paragraphs["document"]["train"])
    assert not set(paragraphs["document"]["train"]) & set(paragraphs["document"]["test"])
    assert once.fingerprint() != again.fingerprint()


def test_an_unknown_place_of_novelty_is_an_error():
    with pytest.raises(UserError, match=r"corpus.new_in=corpsu is unknown; .*corpus"):
        Docstrings(SMALL.train, SMALL.validation, SMALL.test, new_in="corpsu")


def test_a_limit_makes_reading_short():
    limited = Docstrings(SMALL.train, SMALL.validation, SMALL.test, max_characters=20_000)
    found = docstrings_module._collect(limited)
    assert 20_000 <= sum(len(document) for _, document in found["train"]) < 60_000
    assert 2_500 <= sum(len(document) for _, document in found["validation"]) < 30_000
    assert limited.fingerprint() != SMALL.fingerprint()


def test_fingerprint_follows_versions(monkeypatch):
    before = SMALL.fingerprint()
    monkeypatch.setattr(docstrings_module, "_version", lambda package: "0.0")
    assert SMALL.fingerprint() != before


def test_docstrings_errors():
    with pytest.raises(UserError, match="names joblib twice"):
        Docstrings(train=["joblib"], validation=["joblib"], test=["rich"])
    with pytest.raises(UserError, match="max_characters must be a positive number"):
        Docstrings(train=["joblib"], validation=[], test=[], max_characters=0)
    with pytest.raises(UserError, match="found 0 characters for train in no-such-package"):
        list(Docstrings(train=["no-such-package"], validation=["joblib"], test=[]).documents("train"))
    with pytest.raises(UserError, match="no split dev"):
        list(SMALL.documents("dev"))
    with pytest.raises(
        UserError, match=r"corpus\.document=modul is unknown; choose one of module, .*did you mean module"
    ):
        dataclasses.replace(SMALL, document="modul")


# ---- text files ----


def test_what_a_document_is_in_a_file():
    wiki = (
        " \n = First = \n \n Some words . \n \n = = Part = = \n \n More words . \n \n = Second = \n \n Other words . \n"
    )
    assert list(split_documents(wiki)) == [
        "= First =\nSome words .\n= = Part = =\nMore words .",
        "= Second =\nOther words .",
    ]
    assert list(split_documents("one\ntwo\n\nthree\n \n\nfour\n\n")) == ["one\ntwo", "three", "four"]
    assert list(split_documents("one\ntwo\nthree\n\n")) == ["one", "two", "three"]
    assert list(split_documents(" \n\n")) == []


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_titles_with_any_line_ends_after_a_mark_and_of_one_character(tmp_path, end, mark):
    lines = [" = A = ", "", " Words . ", "", " = = B = = ", " More . ", "", "= 北 =", " Others . ", ""]
    (tmp_path / "wiki").write_bytes((mark + end.join(lines)).encode())
    corpus = TextFiles(str(tmp_path / "wiki"), str(tmp_path / "other"))
    expected = ["= A =\nWords .\n= = B = =\nMore .", "= 北 =\nOthers ."]
    assert list(corpus.documents("train")) == expected
    assert list(split_documents(f" = = B = ={end}one{end}{end} = = = {end}")) == ["= = B = =\none", "= = ="]
    (tmp_path / "wiki").write_bytes(mark.encode() + b"Good.\n\xff")
    with pytest.raises(UserError, match=f"at byte {len(mark.encode()) + 6}"):
        list(corpus.documents("train"))


LINE_FEEDS_ONLY = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"]


@pytest.mark.parametrize("sign", LINE_FEEDS_ONLY)
def test_only_line_ends_cut_a_text(tmp_path, sign):
    (tmp_path / "lines").write_bytes(f"one{sign}more\ntwo{sign}more\n".encode())
    assert list(TextFiles(str(tmp_path / "lines"), "other").documents("train")) == [f"one{sign}more", f"two{sign}more"]
    assert list(split_documents(f"a{sign}b\nc\n\nd{sign}e")) == [f"a{sign}b\nc", f"d{sign}e"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_does(tmp_path, end):
    (tmp_path / "lines").write_bytes(end.join(["one", "two", "", "three", ""]).encode())
    assert list(TextFiles(str(tmp_path / "lines"), "other").documents("train")) == ["one\ntwo", "three"]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_text_files_and_their_limits(tmp_path):
    train = write(tmp_path / "train.txt", "".join(f"Document {i} here.\n" for i in range(50)))
    held_out = write(tmp_path / "valid.txt", "Held out one.\nHeld out two.\n")
    corpus = TextFiles(train, held_out)
    assert len(list(corpus.documents("train"))) == 50
    assert list(corpus.documents("test")) == list(corpus.documents("validation")) == ["Held out one.", "Held out two."]
    assert len(list(TextFiles(train, held_out, max_documents=3).documents("train"))) == 3
    limited = TextFiles(train, held_out, max_characters=80)
    assert (len(list(limited.documents("train"))), len(list(limited.documents("validation")))) == (5, 1)
    before = corpus.fingerprint()
    write(tmp_path / "valid.txt", "Something new.\n")
    assert corpus.fingerprint() != before


def test_text_file_errors_are_one_line(tmp_path):
    good, empty, binary = write(tmp_path / "a", "Words.\n"), write(tmp_path / "b", " \n\n"), tmp_path / "c"
    binary.write_bytes(b"\xff\xfe\x00")
    cases = [
        (lambda: TextFiles(good), "give corpus.train=FILE and corpus.validation=FILE"),
        (lambda: TextFiles(good, good), "for two splits"),
        (lambda: TextFiles(good, empty, max_documents=0), "max_documents must be a positive number"),
        (lambda: list(TextFiles(good, empty).documents("validation")), "is empty"),
        (
            lambda: list(TextFiles(good, str(binary)).documents("validation")),
            "is not UTF-8 text but UTF-16: convert it",
        ),
        (lambda: list(TextFiles(str(tmp_path / "no"), good).documents("train")), "there is no such file"),
        (lambda: TextFiles(str(tmp_path), good), "for two splits"),
        (lambda: TextFiles(good, f"{tmp_path}/*.txt"), r"validation=.*/\*.txt matches no file"),
        (lambda: TextFiles([], good), r"corpus.train=\[\] names no file"),
        (lambda: TextFiles([good, f"{tmp_path}/./a"], empty), "corpus.train names .*a twice"),
        (lambda: TextFiles(good, empty, documents="page"), "choose one of auto, title, blank_line, line, file"),
    ]
    for do, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            do()
        assert "\n" not in str(caught.value)


PROSE = """It was late in the year when the letter came, and nobody in the
house had thought that it would come at all; the road was closed
and the mail had not been seen since the first snow had fallen.

The old man read it twice before he said a word, and then he laid
it on the table among the plates and looked out of the window at
the hills.
"""


def test_what_a_document_is_may_be_said(tmp_path):
    other = write(tmp_path / "other", "Other.\n")
    text = write(tmp_path / "text", "= A =\nOne.\n\nTwo.\n= B =\nThree.\n")
    expected = {
        "title": ["= A =\nOne.\nTwo.", "= B =\nThree."],
        "blank_line": ["= A =\nOne.", "Two.\n= B =\nThree."],
        "line": ["= A =", "One.", "Two.", "= B =", "Three."],
        "file": ["= A =\nOne.\nTwo.\n= B =\nThree."],
    }
    found = {unit: list(TextFiles(text, other, documents=unit).documents("train")) for unit in expected}
    assert found == expected
    assert len({TextFiles(text, other, documents=unit).fingerprint() for unit in (*expected, "auto")}) == 5


@pytest.mark.parametrize(
    ("text", "unit", "count"),
    [
        (" = A = \n\n One . \n\n = B = \n\n Two . \n", "title", 2),
        (PROSE * 5, "file", 1),  # a book: lines are broken where they are full
        (
            "\n\n".join(f"Document {i}.\nIt has two sentences, of like length all of them." for i in range(30)),
            "blank_line",
            30,
        ),
        ("\n\n".join(f"A title {i}\n" + "Some words that go on and on. " * 9 for i in range(30)), "blank_line", 30),
        ("\n".join(f"Line {i} of a file of lines, each of which is a document." for i in range(30)), "line", 30),
        (PROSE + "\n" + "A whole sentence.\nAnd another one.\n\n" * 30, "blank_line", 32),
    ],
    ids=["titles", "prose", "sentences", "headings", "lines", "few broken"],
)
def test_what_a_document_is_is_seen_and_said(tmp_path, caplog, text, unit, count):
    caplog.set_level("INFO")
    corpus = TextFiles(write(tmp_path / "text", text), write(tmp_path / "other", "Other.\n"))
    assert len(list(corpus.documents("train"))) == count
    assert f"train: documents are {files._WORDS[unit]} (corpus.documents={unit}, by auto)" in caplog.text
    held_out = "One.\n\nTwo.\nThree.\n\nFour.\n"  # cut as the training text is
    corpus = TextFiles(corpus.train, write(tmp_path / "held_out", held_out))
    as_lines, as_paragraphs = ["One.", "Two.", "Three.", "Four."], ["One.", "Two.\nThree.", "Four."]
    expected = {"line": as_lines, "blank_line": as_paragraphs}.get(unit, ["\n".join(as_lines)])
    assert list(corpus.documents("validation")) == expected


def test_several_files_with_titles_are_articles(tmp_path):
    for name in "ab":
        write(tmp_path / f"{name}.txt", f"Before.\n = {name} = \n One . \n\n = {name}{name} = \n Two . \n")
    write(tmp_path / "c.txt", "No title.\n")
    corpus = TextFiles(str(tmp_path / "?.txt"), write(tmp_path / "other", "Other.\n"))
    assert list(corpus.documents("train")) == [
        *("Before.", "= a =\nOne .", "= aa =\nTwo ."),
        *("Before.", "= b =\nOne .", "= bb =\nTwo .", "No title."),
    ]


def test_a_long_file_comes_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsefinder.corpora.documents._PART", 200)
    corpus = TextFiles(write(tmp_path / "text", PROSE * 5), write(tmp_path / "other", "Other.\n"), documents="file")
    parts = list(corpus.documents("train"))
    assert all(200 <= len(part) < 300 for part in parts[:-1])
    assert "\n".join(parts).split("\n") == [line for line in (PROSE * 5).split("\n") if line]


def test_text_in_folders_patterns_lists_and_compressed(tmp_path, caplog):
    caplog.set_level("INFO")
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    write(folder / ".git" / "index", "Not to be read.\n")
    write(folder / "b.txt", "Second.\n\nIts end.\n")
    write(folder / "deep" / "c.txt", "")
    for name in ("a.txt.gz", "held_out"):  # gzip, whatever it is called
        (tmp_path / name).write_bytes(gzip.compress(f"Of {name}.\n".encode()))
    (tmp_path / "a.txt.gz").rename(folder / "a.txt.gz")
    held_out = str(tmp_path / "held_out")
    both = ["Of a.txt.gz.", "Second.\nIts end."]
    for given in (str(folder), f"{folder}/*.txt*", [f"{folder}/a*", f"{folder}/b.txt"]):
        caplog.clear()
        corpus = TextFiles(given, held_out)
        assert list(corpus.documents("train")) == both
        assert "documents are whole files (corpus.documents=file, by auto)" in caplog.text
        assert list(corpus.documents("test")) == ["Of held_out."]
    assert list(TextFiles([str(folder / "b.txt"), f"{folder}/a*"], held_out).documents("train")) == both[::-1]
    assert list(TextFiles(str(folder), held_out, documents="line").documents("train")) == [
        both[0],
        "Second.",
        "Its end.",
    ]
    before = corpus.fingerprint()
    write(folder / "b.txt", "Second, and more.\n")
    assert corpus.fingerprint() != before


def damaged(data, place):
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


ZIPPED = gzip.compress(b"".join(f"Line {i}.\n".encode() for i in range(2000)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (ZIPPED[: len(ZIPPED) // 2], "ends too early: it was cut; fetch or compress it again"),
        (ZIPPED[:2], "ends too early: it was cut"),
        (damaged(ZIPPED, len(ZIPPED) - 6), "compressed by gzip and damaged"),
        (damaged(ZIPPED, 60), "compressed by gzip and damaged"),
        ("naïve\n".encode("latin-1"), r"not UTF-8 text \(invalid continuation byte at byte 2\): convert it"),
        ("text\n".encode("utf-16"), "not UTF-8 text but UTF-16"),
        ("text\n".encode("utf-16-le"), r"not UTF-8 text \(byte 1 is zero"),
        (b"words \n and \0 zero\n", r"not UTF-8 text \(byte 12 is zero"),
        (bz2.compress(b"text\n"), "is compressed by bzip2: unpack it, or compress it by gzip"),
        (gzip.compress(gzip.compress(b"text\n")), "is compressed by gzip: unpack it"),
        (b"PK\x03\x04whatever", "is a zip archive, not text: unpack it"),
        (gzip.compress("naïve\n".encode("latin-1")), "not UTF-8 text"),
        (gzip.compress(b" \n"), "empty; give a file with text"),
    ],
    ids=[
        "cut",
        "cut at once",
        "sum",
        "inside",
        "latin",
        "utf-16",
        "no mark",
        "zero",
        "bzip2",
        "gzip twice",
        "zip",
        "latin in gzip",
        "empty gzip",
    ],
)
def test_a_file_that_is_no_text_is_one_line(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=rf"^corpus\.train=.*/file .*{message}") as caught:
        list(TextFiles(str(tmp_path / "file"), write(tmp_path / "other", "Other.\n")).documents("train"))
    assert "\n" not in str(caught.value)


def test_text_held_out_is_not_training_text_under_another_name(tmp_path, caplog):
    lines = [f"Line number {i} of this text.\n" for i in range(20)]
    train = write(tmp_path / "train", "".join(lines))
    copies = {
        "copy": lines,
        "order": lines[::-1],
        "part": lines[:5],
        "some": [*lines[:5], "New.\n"],
    }
    files = {name: write(tmp_path / name, "".join(text)) for name, text in copies.items()}
    (tmp_path / "zipped").write_bytes(gzip.compress("".join(lines).encode()))
    (tmp_path / "link").symlink_to(train)
    other = write(tmp_path / "other", "Something else.\n")
    given = {"order": files["order"], "parts": [write(tmp_path / f"part{i}", "".join(lines[i::2])) for i in (1, 0)]}
    with pytest.raises(UserError, match="for two splits"):
        TextFiles(train, str(tmp_path / "link"))
    for other in (files["copy"], str(tmp_path / "zipped")):
        with pytest.raises(
            UserError, match=r"^corpus.train=.* and corpus.validation=.* have the same content: text held"
        ):
            TextFiles(train, other).fingerprint()
    for name, count, total in (("part", 5, 5), ("some", 5, 6)):
        caplog.clear()
        assert len(list(TextFiles(train, files[name]).documents("validation"))) == total
        assert f"{count} of the {total} documents of corpus.validation are in corpus.train too" in caplog.text
    for name in ("order", "parts"):  # the same lines
        with pytest.raises(UserError, match=r"corpus.train and corpus.test have the same documents: text held"):
            list(TextFiles(train, other, given[name], documents="line").documents("test"))
    caplog.clear()
    list(TextFiles(train, files["some"], max_documents=3).documents("train"))
    list(TextFiles(files["some"], write(tmp_path / "new", "Quite new.\n")).documents("validation"))
    assert not caplog.text


def test_wikitext_without_network_is_one_line_within_seconds(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hub cannot be reached") as caught:
        next(WikiText103().documents("train"))
    assert "\n" not in str(caught.value)


def test_wikitext_articles(monkeypatch):
    rows = ["", " = One = \n", "", " Words . \n", " = = Part = = \n", " More . \n", " = Two = \n", " Others . \n"]
    monkeypatch.setattr("sparsefinder.corpora.wikitext._load", lambda split: [{"text": row} for row in rows])
    assert list(WikiText103().documents("test")) == ["= One =\nWords .\n= = Part = =\nMore .", "= Two =\nOthers ."]
    assert len(list(WikiText103(max_documents=1).documents("test"))) == 1


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def in_files(tmp_path, **settings):
    rows = [{"text": f" Document {i}. ", "id": i} for i in range(7)]
    files = {
        "train": jsonl(tmp_path / "a.jsonl", [{"text": " ", "id": -1}, *rows]),
        "validation": jsonl(tmp_path / "b.jsonl", rows),
    }
    return AnyDataset(**{"path": "json", "data_files": files, "max_documents": 4} | settings)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_is_read_row_by_row(tmp_path, monkeypatch, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    corpus = in_files(tmp_path, streaming=streaming)
    assert list(corpus.documents("train")) == [f"Document {i}." for i in range(4)]  # an empty row is none
    assert (
        list(corpus.documents("test")) == list(corpus.documents("validation")) == [f"Document {i}." for i in range(4)]
    )
    before = corpus.fingerprint()
    assert before != in_files(tmp_path, streaming=streaming, max_documents=5).fingerprint()
    jsonl(tmp_path / "b.jsonl", [{"text": "Other."}])
    assert before != corpus.fingerprint()


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        *(
            ("train", "train[:1%]"),
            ("train[:1%]", "train"),
            ("train", "train"),
            ("train[:5%](pct1_dropremainder)", "train"),
        ),
        *(("train[:90%]", "train[80%:]"), ("train[:90%]", "train[-20%:]"), ("train[:10]", "train[9:12]")),
        *(
            ("train[:1_000]", "train[:1%]"),
            ("train[50%:]", "test+train[99%:]"),
            ("train + test", "test"),
            ("all", "test"),
        ),
    ],
)
def test_training_text_is_not_held_out(train, held_out):
    for name in ("validation", "test"):
        with pytest.raises(UserError, match="name two splits that share none; text held out must not be") as caught:
            AnyDataset("x", train=train, streaming=False, **{"validation": "validation", name: held_out})
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        *(("train", "test[:1%]"), ("train[:90%]", "train[90%:]"), ("train[:-10%]", "train[-10%:]")),
        *(("train[:1000]", "train[1000:1200]"), ("train[:-5]", "train[-5:]"), ("train[100%:]", "train[:100%]")),
        *(("train[10:20%]", "train[:10%]"), ("train[:40%]+train[60%:]", "train[40%:60%]"), ("train[:0]", "train")),
    ],
)
def test_slices_that_share_no_row_are_taken(train, held_out):
    AnyDataset("x", train=train, validation=held_out, streaming=False)


def test_a_file_is_not_training_text_and_held_out(tmp_path):
    file, link = jsonl(tmp_path / "a.jsonl", [{"text": "One."}]), tmp_path / "link.jsonl"
    link.symlink_to(file)
    for other in (file, f"{tmp_path}/../{tmp_path.name}/a.jsonl", str(link)):
        with pytest.raises(UserError, match=r"from the same rows of .*a\.jsonl"):
            in_files(tmp_path, data_files={"train": file, "validation": other})
    in_files(tmp_path, data_files={"rows": file}, train="rows[:50%]", validation="rows[50%:]")


def test_a_folder_of_files_is_known_by_its_content(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "validation"):
        jsonl(folder / f"{split}.jsonl", [{"text": f"Of {split}."}])
    corpus = AnyDataset(str(folder), max_documents=4)
    assert list(corpus.documents("validation")) == ["Of validation."]
    before = corpus.fingerprint()
    (folder / ".git").mkdir()
    write(folder / ".git" / "index", "whatever")
    assert corpus.fingerprint() == before
    jsonl(folder / "train.jsonl", [{"text": "Another."}])
    assert corpus.fingerprint() != before


ROWS_WITH_NULLS = {
    "csv": "text,id,note\nhello world,1,\nnull,2,\n,3,\nNA,4,\nlast row,5,\n",
    "json": "".join(
        json.dumps({"text": t, "id": 1, "note": None}) + "\n" for t in ("hello world", None, "last row", None, None)
    ),
}


@pytest.mark.parametrize("kind", ROWS_WITH_NULLS)
@pytest.mark.parametrize("streaming", [True, False])
def test_rows_without_text_are_left_out_and_counted(tmp_path, monkeypatch, caplog, kind, streaming):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    caplog.set_level("INFO")
    files = {split: write(tmp_path / f"{split}.{kind}", ROWS_WITH_NULLS[kind]) for split in ("train", "validation")}
    corpus = AnyDataset(kind, data_files=files, max_documents=10, streaming=streaming)
    assert list(corpus.documents("train")) == ["hello world", "last row"]
    assert "train: 3 of 5 rows have no text (null) and are left out" in caplog.text
    for column, message in (
        ("note", "column=note of .* holds no text: all 5 rows are null"),
        ("id", "^corpus.*holds int"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            list(AnyDataset(kind, data_files=files, max_documents=10, column=column).documents("train"))
        assert "cannot be read" not in str(caught.value)


def test_rows_held_out_are_not_training_rows_under_another_name(tmp_path, caplog):
    rows = [{"text": f"Row number {i}."} for i in range(9)]
    train, copy = jsonl(tmp_path / "a.jsonl", rows), jsonl(tmp_path / "b.jsonl", rows)
    some, new = (
        jsonl(tmp_path / "c.jsonl", [*rows[:2], {"text": "New."}]),
        jsonl(tmp_path / "d.jsonl", [{"text": "Newer."}]),
    )

    def corpus(**files):
        return AnyDataset("json", data_files=files, max_documents=50)

    for given in ({"train": train, "validation": copy}, {"train": [new, train], "validation": [some, copy]}):
        with pytest.raises(
            UserError, match=r"data_files.train=.*a.jsonl and .*validation=.*b.jsonl have the same content"
        ):
            corpus(**given).fingerprint()
    assert len(list(corpus(train=train, validation=some).documents("validation"))) == 3
    assert "2 of the 3 documents of corpus.validation are in corpus.train too" in caplog.text
    caplog.clear()
    assert len(list(corpus(train=str(tmp_path / "[ac].jsonl"), validation=new).documents("train"))) == 12
    assert len(list(corpus(train=train, validation=new).documents("test"))) == 1
    assert not caplog.text


def test_a_stream_takes_no_more_rows_than_wanted(monkeypatch):
    def endless(*_, **__):
        yield from ({"text": "Text."} for _ in range(3))
        raise AssertionError("a fourth row was read")

    monkeypatch.setattr("sparsefinder.corpora.any_dataset.load_split", endless)
    assert list(AnyDataset("endless", max_documents=2).documents("train")) == ["Text."] * 2
    assert list(AnyDataset("endless", max_characters=12).documents("train")) == ["Text."] * 3
    assert list(AnyDataset("endless", max_characters=12).documents("test")) == ["Text."]


def test_a_wrong_dataset_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    broken = {"train": write(tmp_path / "c.jsonl", '{"text": '), "validation": write(tmp_path / "d.jsonl", "{}")}
    zipped = tmp_path / "zipped.jsonl"
    zipped.write_bytes(gzip.compress(b'{"text": "One."}'))
    cases = [
        (
            lambda: in_files(tmp_path, train="trian").fingerprint(),
            "train=trian is not in .*: choose one of train, validation",
        ),
        (
            lambda: in_files(tmp_path, test="tset").fingerprint(),
            "test=tset is not in .*: choose one of train, validation",
        ),
        (
            lambda: next(in_files(tmp_path, train="train[:5]").documents("train")),
            "train=.* no slices; set corpus.streaming",
        ),
        (
            lambda: in_files(tmp_path, train="train[:5", streaming=False),
            r"train\[:5 is no split of a data set .*: give a name",
        ),
        (
            lambda: in_files(tmp_path, train="train[:5](closest)", streaming=False),
            "is no split of a data set .*rounding",
        ),
        (
            lambda: in_files(tmp_path, validation="validation[:200%]", streaming=False),
            r"validation\[:200%\] is no split",
        ),
        (
            lambda: in_files(tmp_path, data_files={"train": str(zipped)}).fingerprint(),
            "give it a name that ends in .gz",
        ),
        (
            lambda: in_files(tmp_path, data_files={"train": write(tmp_path / "e", "")}).fingerprint(),
            "e is empty",
        ),
        (lambda: AnyDataset(), "needs a data set"),
        (lambda: AnyDataset("x"), "corpus.max_documents=N"),
        (lambda: AnyDataset("x", max_documents=0), "must be a positive number"),
        (lambda: AnyDataset("x", max_documents=1, validation="train"), "two splits"),
        (lambda: next(in_files(tmp_path, column="words").documents("train")), "choose one of text, id"),
        (lambda: next(in_files(tmp_path, column="id").documents("train")), "holds int, not text"),
        (
            lambda: next(in_files(tmp_path, data_files=broken).documents("train")),
            "json cannot be read on|cannot be loaded",
        ),
        (
            lambda: in_files(tmp_path, data_files={"train": "/no"}).fingerprint(),
            "data_files.train=/no: there is no such file",
        ),
        (lambda: next(in_files(tmp_path).documents("dev")), "choose one of train"),
        (lambda: next(AnyDataset("nobody/nothing", max_documents=1).documents("train")), "hub cannot be reached"),
    ]
    for do, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            do()
        assert "\n" not in str(caught.value)


# ---- tokens ----

SENTENCE = "The model attends to the keys that its query needs, and to few others. "


@pytest.fixture
def corpus(tmp_path):
    train = write(tmp_path / "train.txt", "\n\n".join(SENTENCE * (1 + i % 5) + f"Number {i}." for i in range(40)))
    return TextFiles(train, write(tmp_path / "valid.txt", SENTENCE * 3 + "\n\n" + SENTENCE))


def test_the_tokenizer_is_deterministic_reversible_and_saved(corpus, tmp_path):
    tokenizer = train_tokenizer(corpus.documents("train"), 300, 64)
    again = train_tokenizer(corpus.documents("train"), 300, 64)
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert len(tokenizer) == 300
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = type(tokenizer).from_pretrained(tmp_path / "tokenizer")
    text = "Unseen: naïve 北京 🙂\n\ttabs"
    for one in (tokenizer, loaded):
        assert (one.model_max_length, one.pad_token_id, one.mask_token_id, one.cls_token_id) == (64, 1, 4, 0)
        ids = one(text)["input_ids"]
        assert (ids[0], ids[-1]) == (0, 2)
        assert one.decode(ids[1:-1]) == text
    with pytest.raises(UserError, match="vocabulary_size must be at least 261"):
        train_tokenizer([], 100, 64)


def test_words_without_end_are_learned_from_in_linear_time(monkeypatch, caplog):
    text = "".join(random.Random(0).choice("ACGT") for _ in range(100_000))  # in one word: ten seconds
    began = time.process_time()
    tokenizer = train_tokenizer([text, "Short words."], 400, 64)
    assert time.process_time() - began < 5
    assert (
        "1 of the words that the vocabulary is learned from have more than 1,000 bytes (the longest has 100,000)"
        in caplog.text
    )
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    caplog.clear()
    short = ["北京，" * 2000, *(SENTENCE + text[start : start + 60] for start in range(0, 6000, 60))]
    bounded = train_tokenizer(short, 400, 64).backend_tokenizer.to_str()
    monkeypatch.setattr(vocabulary, "_LONGEST", 100_000)
    assert bounded == train_tokenizer(short, 400, 64).backend_tokenizer.to_str()  # ordinary text: nothing changes
    assert not caplog.text


def test_blocks_hold_whole_documents_in_pieces(corpus):
    tokenizer = tiny_tokenizer()
    blocks = token_blocks(corpus, tokenizer, "train", 20)
    assert len(blocks) == len(blocks.lengths)
    assert int(blocks.lengths.max()) == 20
    assert int(blocks.lengths.min()) >= 8
    expected = []
    for document in corpus.documents("train"):
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        pieces = [[0, *ids[start : start + 18], 2] for start in range(0, len(ids), 18)]
        expected += [piece for piece in pieces if len(piece) >= 8]
    assert sorted(blocks[i].tolist() for i in range(len(blocks))) == sorted(expected)
    with pytest.raises(IndexError):
        blocks[len(blocks)]


def test_a_limit_gives_the_first_blocks_and_the_cache_the_same(corpus, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    blocks = token_blocks(corpus, tokenizer, "train", 20, cache=tmp_path / "cache")
    some = token_blocks(corpus, tokenizer, "train", 20, limit=7)
    assert len(some) == 7
    assert torch.equal(some.ids, blocks.first(7).ids)
    monkeypatch.setattr(TextFiles, "documents", lambda *_: pytest.fail("read again"))
    again = token_blocks(corpus, tokenizer, "train", 20, cache=tmp_path / "cache")
    assert torch.equal(again.ids, blocks.ids)
    assert torch.equal(again.starts, blocks.starts)


@dataclasses.dataclass(frozen=True)
class Given:
    """A corpus of these documents."""

    texts: tuple[str, ...]
    pack: bool = False

    def documents(self, split, cache=None):
        return iter(self.texts)

    def fingerprint(self):
        return str(self.texts)


def test_short_documents_are_packed_into_whole_blocks(caplog, tmp_path):
    texts = (*(f"{SENTENCE * (i % 3)}Number {i}." for i in range(60)), "")
    tokenizer = tiny_tokenizer()
    loose = token_blocks(Given(texts), tokenizer, "train", 100, cache=tmp_path)
    assert re.search(
        r"train: only \d+ % of the room for 100 tokens in a block is filled; corpus.pack=true puts", caplog.text
    )
    caplog.clear()
    blocks = token_blocks(Given(texts, pack=True), tokenizer, "train", 100, cache=tmp_path)
    assert not caplog.text
    assert len(blocks) < len(loose) / 2
    assert (blocks.lengths[:-1] == 100).all()
    rows = [blocks[index].tolist() for index in range(len(blocks))]
    assert all((row[0], row[-1]) == (0, 2) for row in rows)
    joined = [token for row in rows for token in row[1:-1]]  # every document once, with a separator between two
    found = [list(part) for is_end, part in itertools.groupby(joined, lambda token: token == 2) if not is_end]
    assert sorted(found) == sorted(ids for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] if ids)
    assert torch.equal(token_blocks(Given(texts, pack=True), tokenizer, "train", 100, limit=2).ids, blocks.first(2).ids)
    token_blocks(Given(texts[:3], pack=True), tokenizer, "train", 400)
    assert "is filled; there is no more text" in caplog.text


def test_the_log_says_how_many_blocks_are_full_with_and_without_packing(caplog):
    """The plain reference: blocks made both ways, counted."""
    caplog.set_level("INFO")
    texts, tokenizer = tuple(SENTENCE * n for n in (1, 2, 9, 1, 5, 3)), tiny_tokenizer()
    shares, lines = {}, {}
    for pack in (False, True):
        caplog.clear()
        lengths = token_blocks(Given(texts, pack=pack), tokenizer, "train", 40).lengths
        shares[pack] = f"{100 * float((lengths == 40).double().mean()):.0f} %"
        lines[pack] = caplog.text
    assert shares[False] != shares[True]
    assert f"{shares[False]} of the blocks are full, and {shares[True]} would be with corpus.pack=true" in lines[False]
    assert f"{shares[True]} of the blocks are full, and {shares[False]} without packing" in lines[True]


def test_packed_blocks_are_full_without_a_separator():
    tokenizer = tiny_tokenizer()
    tokenizer.sep_token = tokenizer.eos_token = None
    blocks = token_blocks(Given((SENTENCE,) * 9, pack=True), tokenizer, "train", 40)
    alone = tokenizer(SENTENCE, add_special_tokens=False)["input_ids"]
    assert [token for i in range(len(blocks)) for token in blocks[i].tolist()[1:-1]] == alone * 9


def test_blocks_without_a_word_that_is_known_are_left_out():
    tokenizer = tiny_tokenizer()
    unknown = "\u4eac " * 30
    assert set(tokenizer(unknown)["input_ids"]) <= set(tokenizer.all_special_ids)
    both = token_blocks(Given((unknown, SENTENCE * 3)), tokenizer, "train", 20)
    assert torch.equal(both.ids, token_blocks(Given((SENTENCE * 3,)), tokenizer, "train", 20).ids)
    with pytest.raises(
        UserError, match=r"of 8 tokens or more that this tokenizer knows: .* blocks hold only special tokens"
    ):
        token_blocks(Given((unknown,)), tokenizer, "train", 20)
    with pytest.raises(UserError, match="there is nothing to mask: 1 blocks"):
        masked_batches([torch.tensor([0, 3, 3, 2])], tokenizer)
    tokenizer.mask_token = None
    with pytest.raises(UserError, match="the tokenizer has no mask token"):
        masked_batches([torch.tensor([0, 7, 8, 2])], tokenizer)


def test_blocks_need_text_and_room(tmp_path):
    corpus = TextFiles(write(tmp_path / "a", "Few.\n"), write(tmp_path / "b", "Words.\n"))
    with pytest.raises(UserError, match="the train part of the corpus has no text of 8 tokens"):
        token_blocks(corpus, tiny_tokenizer(), "train", 20)
    with pytest.raises(UserError, match="blocks of 4 tokens are too short"):
        token_blocks(corpus, tiny_tokenizer(), "train", 4)


# ---- masking ----


def test_masks_do_not_depend_on_the_batch(corpus):
    """Trap 10: every variant must be asked about the same positions."""
    tokenizer = tiny_tokenizer()
    blocks = token_blocks(corpus, tokenizer, "train", 30)

    def examples(found):
        return [(ids[valid].tolist(), labels[valid].tolist()) for batch in found for ids, labels, valid in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)]  # fmt: skip

    one, many = (examples(masked_batches(blocks, tokenizer, seed=3, batch_size=size)) for size in (1, 7))
    assert one == many
    assert one[:5] == examples(masked_batches(blocks.first(5), tokenizer, seed=3, batch_size=4))
    assert one != examples(masked_batches(blocks, tokenizer, seed=4, batch_size=1))


def test_masking_follows_berts_recipe():
    ids = torch.cat([torch.tensor([0]), torch.randint(5, 1000, (20_000,)), torch.tensor([2, 1, 1])])
    masking = Masking(mask_token_id=4, vocabulary=1000, special=(0, 1, 2, 3, 4), fraction=0.15)
    inputs, labels = masking(ids, seed=0, example=5)
    chosen = labels != -100
    assert int(chosen.sum()) == 3000
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(inputs[~chosen], ids[~chosen])
    assert not chosen[torch.isin(ids, torch.tensor([0, 1, 2]))].any()
    masked, kept = (inputs[chosen] == 4).float().mean(), (inputs[chosen] == ids[chosen]).float().mean()
    assert math.isclose(masked, 0.8, abs_tol=0.03)
    assert math.isclose(kept, 0.1, abs_tol=0.03)
    _short, asked = masking(torch.tensor([0, 7, 8, 2]), seed=0, example=0)
    assert int((asked != -100).sum()) == 1


def test_padding_of_a_batch(corpus):
    tokenizer = tiny_tokenizer()
    blocks = token_blocks(corpus, tokenizer, "train", 30)
    ids, valid = blocks.batch([0, 1, 2], tokenizer.pad_token_id)
    assert ids.shape == valid.shape == (3, int(blocks.lengths[:3].max()))
    for row, index in enumerate(range(3)):
        assert torch.equal(ids[row][valid[row]], blocks[index])
        assert (ids[row][~valid[row]] == tokenizer.pad_token_id).all()


def test_blocks_are_not_masked_at_the_same_places() -> None:
    masking = Masking(mask_token_id=4, vocabulary=50, special=(0, 1, 2, 3, 4))
    block = torch.arange(5, 45)
    asked = [
        tuple((masking(block, seed=0, example=example)[1] != -100).nonzero()[:, 0].tolist()) for example in range(8)
    ]
    assert len(set(asked)) == 8
