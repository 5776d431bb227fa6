"""Sentences packed into one row by a mask are attended to as if alone, or refused; and so is a text that is too long."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from sparsefinder.attention import Bucketed, Masked
from sparsefinder.errors import UserError
from sparsefinder.models import plugged, set_normalizer
from sparsefinder.models.packing import read_mask
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.full import Full
from sparsefinder.patterns.oracle_topk import OracleTopK
from sparsefinder.patterns.window import Window

ENTMAX = Normalizer(1.5)
OF = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0, 0, 1, 1, 1, 1, 1, -1, -1]])  # sentence of each token, -1 on padding
PAIRS = ((OF[:, :, None] == OF[:, None]) & (OF >= 0)[:, None])[:, None]
PLACES = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1], [0, 1, 0, 1, 2, 3, 4, 0, 0]])


def additive(pairs: torch.Tensor, absent: float) -> torch.Tensor:
    return torch.zeros(pairs.shape).masked_fill(~pairs, absent)


MASKS = {
    "bool": PAIRS,
    "-inf": additive(PAIRS, float("-inf")),
    "smallest number": additive(PAIRS, torch.finfo(torch.float32).min),
    "BERT's old number": additive(PAIRS, -10000.0),
}


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    set_normalizer(model, ENTMAX)
    return model


def packed_logits(model, mask: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_batch((9, 9))["input_ids"], attention_mask=mask, position_ids=PLACES + 2).logits


def alone_logits(model) -> torch.Tensor:
    ids, rows = tiny_batch((9, 9))["input_ids"], []
    for row, of in zip(ids, OF, strict=True):
        for sentence in range(int(of.max()) + 1):
            with torch.no_grad():
                rows.append(model(row[None, of == sentence]).logits[0])
    return torch.cat(rows)


@pytest.mark.parametrize("kind", MASKS)
def test_dense_entmax_honours_packing(kind, model) -> None:
    torch.testing.assert_close(packed_logits(model, MASKS[kind])[OF >= 0], alone_logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    "attention", [Masked(Full()), Masked(OracleTopK(0.5)), Masked(Window(3)), Bucketed(Window(3))], ids=repr
)
def test_a_plugged_attention_sees_each_sentence_alone(kind, attention, model) -> None:
    """A pattern that ranks keys, too: half of all keys, less those of other sentences, would be fewer."""
    with plugged(model, attention):
        torch.testing.assert_close(
            packed_logits(model, MASKS[kind])[OF >= 0], alone_logits(model), rtol=1e-4, atol=1e-5
        )


def test_gradients_pass_through_packing(model) -> None:
    q = torch.randn(2, 1, 9, 4, requires_grad=True)
    valid, sentences = read_mask(PAIRS, q, q, causal=False)
    assert torch.equal(valid, OF >= 0)
    assert sentences is not None
    assert sentences.valid.sum(-1).tolist() == [4, 3, 2, 2, 5]
    (2 * sentences.together(sentences.apart(q), q.shape)).sum().backward()
    torch.testing.assert_close(q.grad, 2.0 * (OF >= 0)[:, None, :, None].expand_as(q))


def test_padding_is_no_packing(model) -> None:
    q, real = torch.zeros(2, 2, 9, 4), OF >= 0
    for mask in (real[:, None, None].expand(2, 1, 9, 9), (real[:, None, None] & real[:, None, :, None])):
        valid, sentences = read_mask(mask, q, q, causal=False)
        assert torch.equal(valid, real)
        assert sentences is None
    nothing = torch.zeros(2, 1, 9, 9, dtype=torch.bool)
    assert not read_mask(nothing, q, q, causal=False)[0].any()


def test_a_causal_mask_needs_a_causal_attention() -> None:
    q, triangle = torch.zeros(2, 2, 9, 4), torch.ones(9, 9, dtype=torch.bool).tril()
    assert read_mask((PAIRS & triangle), q, q, causal=True)[1] is not None
    assert read_mask(triangle.expand(2, 1, 9, 9), q, q, causal=True)[1] is None
    with pytest.raises(UserError, match="causal=True"):
        read_mask(triangle.expand(2, 1, 9, 9), q, q, causal=False)


STRANGE = {
    "overlapping": (PAIRS | PAIRS.roll(1, -1), "neither padding nor sentences side by side"),
    "not oneself": (~torch.eye(9, dtype=torch.bool).expand(2, 1, 9, 9), "neither padding nor sentences side by side"),
    "by head": (torch.stack([PAIRS[:, 0], torch.ones_like(PAIRS[:, 0])], 1), "from head to head"),
    "a bias": (additive(PAIRS, -10000.0) - 0.5, "other numbers than 0"),
    "integers": (PAIRS.long(), r"mask of torch\.int64"),
    "fewer keys": (None, "as many keys as queries"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_other_masks_are_one_line(kind) -> None:
    mask, message = STRANGE[kind]
    q = torch.zeros(2, 2, 9, 4)
    with pytest.raises(UserError, match=message) as caught:
        read_mask(mask, q, q if mask is not None else q[:, :, :5], causal=False)
    assert "\n" not in str(caught.value)


def test_a_bias_is_added_in_dense_attention(model) -> None:
    """The same number on all keys changes nothing, another one on some keys does."""
    expected = packed_logits(model, PAIRS)
    everywhere = additive(PAIRS, -10000.0) + 0.5
    torch.testing.assert_close(packed_logits(model, everywhere)[OF >= 0], expected[OF >= 0], rtol=1e-4, atol=1e-5)
    everywhere[..., 1] -= 2.0
    assert not torch.allclose(packed_logits(model, everywhere)[OF >= 0], expected[OF >= 0], atol=1e-2)


@pytest.mark.parametrize("family", ["roberta", "bert", "albert", "distilbert"])
def test_a_text_longer_than_the_model_is_one_line(family) -> None:
    model = tiny_model(family)
    longest = 38 if family == "roberta" else 40
    with torch.no_grad(), plugged(model, Masked(Window(3))):
        model(torch.full((1, longest), 5))
        for given in ({"input_ids": torch.full((1, 41), 5)}, {"inputs_embeds": torch.zeros(1, 41, 16)}):
            if family == "albert" and "inputs_embeds" in given:
                continue  # its embeddings are of another size
            with pytest.raises(UserError, match=f"this text has 41 tokens, and the model reads {longest} at most"):
                model(**given)


def test_positions_beyond_the_model_are_one_line(model) -> None:
    with pytest.raises(UserError, match="the model reads 38 at most"), plugged(model, Masked(Window(3))):
        model(torch.full((1, 3), 5), position_ids=torch.tensor([[2, 3, 40]]))


def test_modernbert_has_no_table_to_leave() -> None:
    model = tiny_model("modernbert")
    with torch.no_grad(), plugged(model, Masked(Window(3))):
        assert model(torch.full((1, 60), 5)).logits.shape[1] == 60
