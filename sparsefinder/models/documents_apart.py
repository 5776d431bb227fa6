"""Several documents in a block, each read as if it were alone: what ``corpus.pack=apart`` makes of a masked language model.

Batches stay what they are, ids and a padding mask ``(B, N)``; what a model sees of them is said where its forward pass begins.
There the padding mask becomes one of pairs, ``(B, 1, N, N)``, and positions begin anew with every document. The states of a
document are then those that the model gives it alone, whatever lies beside it. The model's own attention multiplies all pairs of
a block and drops those between documents; an attention that is plugged in is given each document as a row of its own
(`sparsefinder.models.packing`), so that no pattern is shown a key of another document.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefinder.corpora.packing import APART, boundary_of, document_of, pack_of
from sparsefinder.errors import UserError
from sparsefinder.models.families import kind_of
from sparsefinder.models.position_tables import reserved_rows_of


def read_apart(model: Any, tokenizer: Any, corpus: Any) -> None:
    """Let a model see each document alone from now on, where a corpus lays several into a block side by side; else nothing.

    Args:
        model: Of one of the families, changed in place: its copies see documents alone too, what it saves knows nothing of it.
        tokenizer: Its tokenizer, whose special tokens lie between two documents.
        corpus: The text; see `sparsefinder.corpora.packing`.

    Raises:
        UserError: The model writes, or the tokenizer does not put a special token at both ends of a text.
    """
    if pack_of(corpus) != APART:
        return
    if kind_of(model.config) != "encoder":
        raise UserError(
            f"corpus.pack=apart is for masked language models, and this is a {model.config.model_type}: give corpus.pack=true"
        )
    model.base_model.register_forward_pre_hook(DocumentsApart(boundary_of(tokenizer)), with_kwargs=True)


def pairs_within(document: Tensor, valid: Tensor) -> Tensor:
    """Who may see whom: ``(B, 1, N, N)`` bool, True for the real tokens of a query's own document.

    Padding sees the last document, since a row of nothing is no number under softmax; nobody sees padding.

    Args:
        document: ``(B, N)`` int64, which document each token belongs to.
        valid: ``(B, N)`` bool, False on padding.
    """
    return ((document[:, :, None] == document[:, None]) & valid[:, None])[:, None]


def places_within(document: Tensor) -> Tensor:
    """Where each token stands in its document, counted from 0: ``(B, N)`` int64 → ``(B, N)`` int64; they lie in order."""
    token = torch.arange(document.shape[1], device=document.device).expand_as(document)
    begins = torch.ones_like(document, dtype=torch.bool)
    begins[:, 1:] = document.diff() != 0
    return token - torch.where(begins, token, 0).cummax(-1).values


@dataclass(frozen=True)
class DocumentsApart:
    """A hook at the begin of a forward pass: a padding mask becomes one of pairs within documents, with their positions.

    Without a mask all tokens are real; a mask of pairs, and vectors instead of ids, are left as they are given.
    """

    boundary: tuple[int, int]  # the last token of a document and the first of the next one

    def __call__(
        self, base: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        ids: Tensor | None = inputs[0] if inputs else named.get("input_ids")
        valid: Tensor | None = named.get("attention_mask")
        if ids is None or (valid is not None and valid.ndim != 2):
            return None
        config: Any = base.config
        document = document_of(ids, self.boundary)
        valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.bool()
        pairs = pairs_within(document, valid)
        places = places_within(document)
        mask: Any = pairs
        if getattr(config, "layer_types", None):  # some layers look through a window, which a mask of pairs must have
            token = torch.arange(ids.shape[1], device=ids.device)
            near = (token - token[:, None]).abs() <= config.sliding_window
            mask = {"full_attention": pairs, "sliding_attention": pairs & near}
        return inputs, named | {"attention_mask": mask, "position_ids": places + reserved_rows_of(config)}
