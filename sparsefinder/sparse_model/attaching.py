"""``sparsefinder.attach`` and ``sparsefinder.detach``: a predicted graph in the place of a model's dense attention."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from sparsefinder.errors import UserError
from sparsefinder.executors.choose_executor import AUTO
from sparsefinder.models import describe, get_normalizer
from sparsefinder.models.families import check_family, kind_of
from sparsefinder.models.replacement import attach_and_detach
from sparsefinder.sparse_model.curves import Target
from sparsefinder.sparse_model.index import Attached, Index, hash_of_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attachment:
    """What is attached to a model, and how it is run."""

    index: Index
    setting: Attached


def attach(
    model: Any,
    index: Index,
    *,
    density: float | None = None,
    recall: float | None = None,
    loss_tolerance: float | None = None,
    auto: bool = True,
    executor: str = AUTO,
    another_base_model: bool = False,
) -> None:
    """Let a model attend on the graph that an index predicts, from now on; what was attached before goes.

    Of `density`, `recall` and `loss_tolerance` one may be given; without, every head has the pattern's own setting. Dropout on
    attention probabilities is not applied, and attention weights cannot be asked for. A decoder reads a whole text on the
    graph, a prompt for instance; words behind a cache attend densely, each to all that was read.

    Args:
        model: A model of transformers, with any head or none, or one of sentence-transformers; changed in place.
        index: What `sparsefinder.fit` learned for this model.
        density: Most pairs that all heads together may take, as a share; given to the heads that need them.
        recall: Least share of the gold edges (softmax: of the probability) that each head's graph must hold.
        loss_tolerance: The most that 1 − the cosine of the pooled output to the dense one may be, on the texts of `fit`.
        auto: Use dense attention below the length at which the prediction pays on this machine. False: never.
        executor: What multiplies: ``auto``, ``native``, ``blocks`` or ``triton``.
        another_base_model: Attach all the same to a model with other weights, such as a finetuned one.

    Raises:
        UserError: For an index of another model, more than one target, and a model whose attention cannot be replaced.
    """
    if not isinstance(index, Index):
        raise UserError(
            f"index is a {type(index).__name__}: give what sparsefinder.fit or sparsefinder.Index.load returned"
        )
    encoder = transformer_of(model)
    check_fit(index, encoder, another_base_model)
    given = {"density": density, "recall": recall, "loss_tolerance": loss_tolerance}
    named = [(name, value) for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UserError(f"{' and '.join(name for name, _ in named)} are given: choose one")
    put(encoder, index, index.setting(Target(*named[0]) if named else None, auto, executor))


def put(encoder: PreTrainedModel, index: Index, setting: Attached) -> None:
    """Attach with a setting that is known."""
    attention = index.attention(setting)
    attach_and_detach.attach(encoder, attention, Attachment(index, setting))


def detach(model: Any) -> None:
    """The model from before `attach`, to the digit.

    Args:
        model: What `attach` was given, or a part of it.

    Raises:
        UserError: Where nothing is attached.
    """
    attach_and_detach.detach(transformer_of(model))


def attachment(model: Any) -> Attachment:
    """What is attached to a model; a `UserError` where nothing is."""
    owner = attach_and_detach.owner_of(model)
    if not isinstance(owner, Attachment):
        raise UserError(f"nothing is attached to this {type(model).__name__}: call sparsefinder.attach first")
    return owner


def transformer_of(model: Any) -> PreTrainedModel:
    """The model of transformers in what somebody has: itself, or the one inside a model of sentence-transformers.

    Raises:
        UserError: Where there is none, and for families whose attention cannot be replaced.
    """
    encoder = model
    if not isinstance(model, PreTrainedModel):
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        inside = [module for module in modules if isinstance(module, PreTrainedModel)]
        if not inside:
            raise UserError(
                f"{type(model).__name__} is no model of transformers and holds none: give what from_pretrained returned, or a "
                "SentenceTransformer"
            )
        encoder = inside[0]
    label = encoder.name_or_path or type(encoder).__name__
    check_family(encoder.config.model_type, label, ("encoder", "decoder"))
    if kind_of(encoder.config) == "encoder" and getattr(encoder.config, "is_decoder", False):
        raise UserError(f"{label} is an encoder configured as a decoder; an index needs is_decoder=false")
    return encoder


def check_fit(index: Index, encoder: PreTrainedModel, another_base_model: bool) -> None:
    """Whether an index belongs to a model.

    Raises:
        UserError: For another shape; for other weights, unless that is allowed by name.
    """
    base, shape = index.base, describe(encoder)
    for what, wanted, there in (
        ("layers", base.layers, shape.layers),
        ("heads", base.heads, shape.heads),
        ("numbers a head", base.head_size, shape.head_size),
        ("as its family", base.family, shape.family),
        ("as the alpha of its entmax", base.alpha, get_normalizer(encoder).alpha),
    ):
        if wanted not in ("", there):
            raise UserError(
                f"this index was learned for a model with {wanted} {what} ({base.name or 'unnamed'}), this one has {there}: "
                + ("say alpha= to from_published, " if what.startswith("as the alpha") and not base.content else "")
                + "give the index of this model, or learn one with sparsefinder.fit"
            )
    if not base.content or another_base_model:
        return
    if encoder.dtype == torch.float16:
        log.warning("weights in float16 cannot be compared with those that the index was learned for")
    elif hash_of_weights(encoder.base_model) not in (base.content, index.saved_with):
        raise UserError(
            f"this index was learned for other weights ({base.name or 'an unnamed model'}): give the index of this model, learn "
            "one with sparsefinder.fit, or say another_base_model=True, for instance of a model that was finetuned since"
        )
