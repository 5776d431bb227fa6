"""Entmax models are traced and exported wherever the same model with softmax is, and right for batches that come later."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_batch, tiny_model

from sparsefinder.attention import Masked
from sparsefinder.errors import UserError
from sparsefinder.models import plugged, set_normalizer
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.window import Window


class Logits(torch.nn.Module):
    """Tensors in, a tensor out."""

    def __init__(self, family: str, alpha: float = 1.5) -> None:
        super().__init__()
        self.model = tiny_model(family)
        set_normalizer(self.model, Normalizer(alpha))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def check(recorded, model: Logits) -> None:
    """Recorded on a batch of two full texts of 9 tokens."""
    for lengths in ((9, 9), (9, 4), (2, 1), (15, 11), (30, 8, 3)):
        batch = tuple(tiny_batch(lengths).values())
        with torch.no_grad():
            torch.testing.assert_close(recorded(*batch), model(*batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "alpha"), [("roberta", 1.5), ("albert", 1.3), ("distilbert", 1.5), ("modernbert", 2.0)]
)
def test_a_traced_model_is_right_for_other_batches(family, alpha) -> None:
    model = Logits(family, alpha).eval()
    check(torch.jit.trace(model, tuple(tiny_batch((9, 9)).values()), check_trace=False), model)


def test_an_exported_model_is_right_for_other_batches() -> None:
    model = Logits("roberta").eval()
    free = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", min=2, max=38)}
    given = tuple(tiny_batch((9, 9)).values())
    check(torch.export.export(model, given, dynamic_shapes=(free, free), strict=False).module(), model)


def test_a_plugged_attention_is_not_traced() -> None:
    model = Logits("roberta").eval()
    with plugged(model.model, Masked(Window(3))), pytest.raises(UserError, match="export the model without it"):
        torch.jit.trace(model, tuple(tiny_batch((9, 9)).values()), check_trace=False)
