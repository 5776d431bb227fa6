"""Damaged texts: what BART's recipe promises, beside a plain form of it, and batches of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny_models import tiny_tokenizer
from torch import Tensor

from sparsefinder.corpora import Denoising, denoising_batches
from sparsefinder.corpora.masking import IGNORED
from sparsefinder.errors import UserError

MASK, END, START = 4, 7, 2
RECIPE = Denoising(START, MASK, (END,), (0, 1, 2, 3, 4), 0.3)


def text(tokens: int, every: int = 5) -> Tensor:
    """``<s>``, different words, a full stop after each so many, ``</s>``."""
    words = [END if (index + 1) % every == 0 else 10 + index for index in range(tokens)]
    return torch.tensor([0, *words, 2])


def spans(before: list[int], after: list[int]) -> list[list[int]]:
    """The words of ``before`` that stand behind each mask of ``after``, found from the left; the others stay in order."""
    found: list[list[int]] = []
    rest = list(before)
    for index, word in enumerate(after):
        if word != MASK:
            assert rest.pop(0) == word
            continue
        found.append([])
        following = next((other for other in after[index + 1 :] if other != MASK), None)
        while rest and rest[0] != following:
            found[-1].append(rest.pop(0))
    assert not rest
    return found


def test_spans_become_a_mask_each_and_never_touch() -> None:
    for example in range(30):
        ids = text(40, every=99)
        inputs, labels = RECIPE(ids, 0, example)
        assert torch.equal(labels, ids)
        assert inputs[0] == 0
        assert inputs[-1] == 2
        body = inputs[1:-1].tolist()
        assert sum(map(len, spans(ids[1:-1].tolist(), body))) == 12  # 30 % of 40
        assert not any(a == b == MASK for a, b in itertools.pairwise(body))
        assert len(inputs) <= len(ids)
        again, _ = RECIPE(ids, 0, example)
        assert torch.equal(again, inputs)
    lengths = torch.tensor(
        [len(span) for example in range(200) for span in spans(list(range(10, 210)), hidden(example))],
        dtype=torch.float,
    )
    assert abs(lengths.mean() - 3.0) < 0.2
    assert (lengths == 0).any(), "a mask where nothing is missing"


def hidden(example: int) -> list[int]:
    inputs, _ = RECIPE(torch.arange(10, 210), 1, example)
    return inputs.tolist()


def test_sentences_stay_whole_in_another_order() -> None:
    few = Denoising(START, MASK, (END,), (0, 2), 0.01)
    orders = set()
    for example in range(20):
        inputs, _ = few(text(20), 0, example)
        body = inputs[1:-1].tolist()
        [position] = [index for index, word in enumerate(body) if word == MASK] or [None]
        heads = [word for word in body if word in (10, 15, 20, 25)]
        orders.add(tuple(heads))
        if position is not None and len(body) == 20:  # one word became a mask: the others are where their sentence is
            sentences = [body[start : start + 5] for start in range(0, 20, 5)]
            for sentence in sentences:
                own = [word for word in sentence if word not in (MASK, END)]
                assert len({(word - 10) // 5 for word in own}) == 1
    assert len(orders) > 5


@pytest.mark.parametrize("tokens", [1, 2, 3, 8])
def test_short_texts(tokens: int) -> None:
    for fraction in (0.01, 0.5, 0.99):
        recipe = Denoising(START, MASK, (END,), (0, 2), fraction)
        for example in range(20):
            inputs, _ = recipe(text(tokens), 0, example)
            assert 2 <= len(inputs) <= tokens + 2
    nothing = torch.tensor([0, 2])
    assert RECIPE(nothing, 0, 0)[0] is nothing


def test_without_a_mask_spans_are_deleted() -> None:
    recipe = Denoising(START, None, (), (0, 2), 0.3)
    inputs, labels = recipe(text(40, every=99), 0, 3)
    with_masks, _ = Denoising(START, MASK, (), (0, 2), 0.3)(text(40, every=99), 0, 3)
    assert inputs.tolist() == [word for word in with_masks.tolist() if word != MASK]
    assert (len(inputs), len(labels)) == (30, 42)


def test_batches_give_the_decoder_the_word_before() -> None:
    blocks = [text(9), text(4), text(6)]
    batches = denoising_batches(blocks, RECIPE, 1, 0, batch_size=2)
    assert [len(batch["labels"]) for batch in batches] == [2, 1]
    batch = batches[0]
    assert torch.equal(batch["labels"][0], blocks[0])
    assert batch["labels"][1].tolist() == [*blocks[1].tolist(), *[IGNORED] * 5]
    assert batch["decoder_input_ids"][1].tolist() == [START, *blocks[1].tolist()[:-1], *[1] * 5]
    assert batch["decoder_attention_mask"].sum(-1).tolist() == [11, 6]
    assert torch.equal(batch["attention_mask"], batch["input_ids"] != 1)
    one_by_one = denoising_batches(blocks, RECIPE, 1, 0, batch_size=1)
    width = one_by_one[1]["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][1, :width], one_by_one[1]["input_ids"][0])


def test_the_recipe_of_a_tokenizer() -> None:
    recipe = Denoising.of(tiny_tokenizer(), 2, 0.2)
    assert (recipe.mask_token_id, recipe.ends, recipe.fraction) == (4, (), 0.2)
    with pytest.raises(UserError, match="fraction of hidden tokens must lie between 0 and 1, got 1"):
        Denoising(START, MASK, (), (), 1.0)
