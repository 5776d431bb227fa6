"""Documents side by side in a block: nothing is lost or doubled, blocks are full, and another way of packing is refused."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import WORDS, tiny_tokenizer

from sparsefinder.corpora import AnyDataset, Docstrings, TextFiles, WikiText103, token_blocks
from sparsefinder.corpora.packing import SHORTEST, boundary_of, document_of, identity_of, pack_of
from sparsefinder.errors import UserError

LENGTH = 40


@dataclass(frozen=True)
class Given:
    """A corpus of these documents."""

    texts: tuple[str, ...]
    pack: bool | str = "apart"

    def documents(self, split: str, cache: Path | None = None) -> Iterator[str]:
        return iter(self.texts)

    def fingerprint(self) -> str:
        return str(self.texts)


def texts_of(seed: int, most: int) -> tuple[str, ...]:
    chance = random.Random(seed)
    return tuple(" ".join(chance.choices(WORDS, k=chance.randint(0, most))) for _ in range(80))


def reference(rows: list[list[int]]) -> list[list[int]]:
    """Block by block and document by document, by hand: each fills what is left of a block, and goes on in the next."""
    blocks: list[list[int]] = [[]]
    for ids in rows:
        rest = list(ids)
        while len(rest) >= SHORTEST - 2:
            if LENGTH - len(blocks[-1]) < SHORTEST:
                blocks.append([])
            taken = min(len(rest), LENGTH - len(blocks[-1]) - 2)
            blocks[-1] += [0, *rest[:taken], 2]
            rest = rest[taken:]
    return blocks


@pytest.mark.parametrize("most", [12, 30, 200])
def test_documents_lie_side_by_side_and_fill_their_blocks(most: int) -> None:
    tokenizer, texts = tiny_tokenizer(LENGTH), texts_of(most, most)
    blocks = token_blocks(Given(texts), tokenizer, "train", LENGTH)
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    rows = tokenizer([texts[index] for index in order], add_special_tokens=False)["input_ids"]
    found = [blocks[index].tolist() for index in range(len(blocks))]
    assert found == reference(rows)
    assert all(LENGTH - len(block) < SHORTEST for block in found[:-1])
    for block in found:
        of = document_of(torch.tensor(block), boundary_of(tokenizer)).tolist()
        parts = [[token for token, each in zip(block, of, strict=True) if each == part] for part in range(of[-1] + 1)]
        assert all((part[0], part[-1]) == (0, 2) and len(part) >= SHORTEST for part in parts)
        assert not any({0, 2} & {*part[1:-1]} for part in parts)
    assert torch.equal(token_blocks(Given(texts), tokenizer, "train", LENGTH, limit=2).ids, blocks.first(2).ids)


def test_blocks_are_kept_apart_from_those_of_another_packing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tokenizer, texts = tiny_tokenizer(LENGTH), texts_of(1, 20)
    made = {}
    for pack in (False, True, "apart", "apart", True, False):
        blocks = token_blocks(Given(texts, pack), tokenizer, "train", LENGTH, cache=tmp_path)
        assert torch.equal(made.setdefault(pack, blocks).ids, blocks.ids)
    assert len({len(blocks.ids) for blocks in made.values()}) == 3
    assert len({identity_of(Given(texts, pack)) for pack in made}) == 3
    assert identity_of(Given(texts, pack=False)) == str(texts)  # as it was before there was a choice
    assert len(re.findall(r"% of the blocks are full, and \d+ % without packing", caplog.text)) == 2


def of_files(folder: Path, pack: Any) -> TextFiles:
    for split in ("train", "test"):
        (folder / split).write_text(f"{split} text")
    return TextFiles(str(folder / "train"), str(folder / "test"), pack=pack)


CORPORA: dict[str, Callable[[Path, Any], Any]] = {
    "docstrings": lambda _, pack: Docstrings(["numpy"], ["scipy"], ["torch"], pack=pack),
    "text": of_files,
    "datasets": lambda _, pack: AnyDataset("json", max_documents=3, pack=pack),
    "wikitext103": lambda _, pack: WikiText103(pack=pack),
}


@pytest.mark.parametrize("name", CORPORA)
def test_another_packing_is_one_line_that_names_the_choices(name: str, tmp_path: Path) -> None:
    for pack in (False, True, "apart"):
        assert pack_of(CORPORA[name](tmp_path, pack)) == pack
    message = r"^corpus.pack=appart is unknown; choose one of false, true, apart; did you mean apart\?$"
    with pytest.raises(UserError, match=message):
        CORPORA[name](tmp_path, "appart")


def test_a_corpus_of_somebody_else_is_refused_by_the_same_line() -> None:
    with pytest.raises(UserError, match=r"corpus\.pack=sideways is unknown; choose one of false, true, apart"):
        token_blocks(Given(("a model",), "sideways"), tiny_tokenizer(LENGTH), "train", LENGTH)


def test_a_tokenizer_without_ends_is_one_line() -> None:
    tokenizer = tiny_tokenizer(LENGTH)
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(
        UserError, match="by the special tokens at both ends of each, and this tokenizer puts none before"
    ):
        token_blocks(Given(texts_of(1, 20)), tokenizer, "train", LENGTH)
