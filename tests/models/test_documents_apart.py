"""Documents side by side in a block are read as if alone: the plain reference reads each of them alone."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCABULARY, tiny_model, tiny_tokenizer

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.corpora.blocks import pad
from sparsefinder.corpora.packing import boundary_of, document_of
from sparsefinder.errors import UserError
from sparsefinder.models import plugged, set_normalizer, softmax
from sparsefinder.models.documents_apart import DocumentsApart, pairs_within, places_within, read_apart
from sparsefinder.models.families import FAMILIES
from sparsefinder.models.masked_lm import masked_logits
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.oracle_topk import OracleTopK
from sparsefinder.patterns.window import Window

ENTMAX = Normalizer(1.5)
FIRST, LAST, PADDING = 0, 2, 1


@dataclass(frozen=True)
class Text:
    """What is asked of a corpus here."""

    pack: bool | str


def document(length: int, chance: torch.Generator) -> list[int]:
    return [FIRST, *torch.randint(5, VOCABULARY, (length,), generator=chance).tolist(), LAST]


def documents(seed: int = 0, lengths: tuple[int, ...] = (6, 3, 9, 4, 5, 1)) -> list[list[int]]:
    chance = torch.Generator().manual_seed(seed)
    return [document(length, chance) for length in lengths]


def blocks_of(parts: list[list[int]], cuts: tuple[int, ...] = (3, 5)) -> tuple[torch.Tensor, torch.Tensor]:
    """Three blocks, of three documents, of two and of one."""
    rows = [parts[: cuts[0]], parts[cuts[0] : cuts[1]], parts[cuts[1] :]]
    return pad([torch.tensor([token for part in row for token in part]) for row in rows], PADDING)


def reading(model, attention) -> contextlib.AbstractContextManager[None]:
    if attention == "softmax":
        return softmax(model)
    return contextlib.nullcontext() if attention is None else plugged(model, attention)


@torch.no_grad()
def alone(model, parts: list[list[int]], attention=None) -> torch.Tensor:
    with reading(model, attention):
        return torch.cat([model(torch.tensor([part])).logits[0] for part in parts])


@torch.no_grad()
def together(model, parts: list[list[int]], attention=None) -> torch.Tensor:
    model = copy.deepcopy(model)
    read_apart(model, tiny_tokenizer(), Text("apart"))
    ids, valid = blocks_of(parts)
    with reading(model, attention):
        logits = model(ids, attention_mask=valid).logits
    assert logits.isfinite().all()  # of padding too, or a gradient is lost
    return logits[valid]


ATTENTIONS = {
    "its own entmax": None,
    "torch's softmax": "softmax",
    "masked": Masked(Window(3), ENTMAX),
    "masked, the best half": Masked(OracleTopK(0.5), ENTMAX),
    "bucketed": Bucketed(Window(3), ENTMAX),
    "bucketed softmax": Bucketed(Window(3)),
}


OF_OTHERS = ("its own entmax", "masked")  # the other families differ in where masks and positions go in


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        (family, each)
        for family in FAMILIES
        for each in (ATTENTIONS if family in ("roberta", "modernbert") else OF_OTHERS)
    ],
)
def test_each_document_is_read_as_if_alone(family: str, attention: str) -> None:
    """Positions begin anew, ranked keys are ranked among their own, and the sliding layer of ModernBERT keeps its window."""
    model, attended = tiny_model(family), ATTENTIONS[attention]
    set_normalizer(model, ENTMAX)
    expected = alone(model, documents(), attended)
    torch.testing.assert_close(together(model, documents(), attended), expected, rtol=1e-5, atol=2e-5)
    assert alone(model, documents(1), attended).sub(expected).abs().max() > 0.1  # it does depend on the words


@given(changed=st.integers(0, 5), seed=st.integers(1, 9))
@settings(max_examples=8, deadline=None)
def test_a_change_in_one_document_changes_no_other(changed: int, seed: int) -> None:
    model, parts = tiny_model(), documents()
    set_normalizer(model, ENTMAX)
    others = [list(part) for part in parts]
    others[changed] = documents(seed)[changed]
    before, after = together(model, parts), together(model, others)
    of = torch.repeat_interleave(torch.arange(6), torch.tensor([len(part) for part in parts]))
    assert torch.equal(before[of != changed], after[of != changed])


def test_gradients_of_one_document_stay_in_it() -> None:
    model, (ids, valid) = tiny_model(), blocks_of(documents())
    read_apart(model, tiny_tokenizer(), Text("apart"))
    labels = torch.full_like(ids, -100)
    labels[0, 9] = 7  # in the second document of the first block
    words = model.get_input_embeddings()
    kept: list[torch.Tensor] = []
    words.register_forward_hook(lambda _, __, output: (output.retain_grad(), kept.append(output))[0])
    logits, answers = masked_logits(model, {"input_ids": ids, "attention_mask": valid, "labels": labels})
    torch.nn.functional.cross_entropy(logits, answers).backward()
    reached = kept[0].grad.abs().sum(-1) > 0
    assert reached[0].nonzero().flatten().tolist() == list(range(8, 13))
    assert not reached[1:].any()


def test_where_documents_begin() -> None:
    """A special token inside a text is no end of it; a mask of pairs is by hand what it is by the function."""
    boundary = boundary_of(tiny_tokenizer())
    assert boundary == (LAST, FIRST)
    ids = torch.tensor([[0, 7, 2, 0, 0, 8, 2, 2, 0, 2, 1], [0, 2, 5, 0, 6, 2, 1, 1, 1, 1, 1]])
    of = document_of(ids, boundary)
    assert of.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2], [0] * 11]
    valid = ids != PADDING
    pairs = pairs_within(of, valid)
    for row, query, key in torch.ones(2, 11, 11).nonzero().tolist():
        assert bool(pairs[row, 0, query, key]) == (of[row, query] == of[row, key] and bool(valid[row, key]))
    assert places_within(of)[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2]


@pytest.mark.parametrize("pack", [False, True])
def test_other_ways_of_packing_change_nothing(pack: bool) -> None:
    model = tiny_model()
    read_apart(model, tiny_tokenizer(), Text(pack))
    read_apart(model, None, object())  # a corpus of somebody else that says nothing of it
    assert not any(isinstance(hook, DocumentsApart) for hook in model.base_model._forward_pre_hooks.values())


def test_masks_of_pairs_and_vectors_are_left_as_they_are() -> None:
    hook, model = DocumentsApart((LAST, FIRST)), tiny_model()
    ids, valid = blocks_of(documents())
    assert hook(model.base_model, (ids,), {"attention_mask": pairs_within(torch.zeros_like(ids), valid)}) is None
    assert hook(model.base_model, (), {"inputs_embeds": torch.zeros(1, 3, 16)}) is None


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "t5"])
def test_who_writes_is_refused_in_one_line(family: str) -> None:
    class Writer:
        config = type("Config", (), {"model_type": family})

    with pytest.raises(UserError, match=f"this is a {family}: give corpus.pack=true") as caught:
        read_apart(Writer(), tiny_tokenizer(), Text("apart"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_ends_is_refused_in_one_line() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    with pytest.raises(UserError, match=r"this tokenizer puts none before a text: give corpus\.pack=true"):
        read_apart(tiny_model(), tokenizer, Text("apart"))
