"""Train the global tokens and the head of an LSG model, and leave the rest as it is."""

from __future__ import annotations

from typing import Any

from torch import nn


def train_only_globals_and_head(model: Any) -> list[str]:
    """Freeze every parameter but the global tokens and the head; returns the names of those that stay trainable.

    The head is what lies outside the base model. A head that shares its weights with the embeddings (masked and causal
    language models) keeps them frozen, since training them would train the embeddings.
    """
    base: nn.Module = model.base_model
    frozen = {id(parameter) for parameter in base.parameters()} if base is not model else set()
    trainable = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "global_embeddings" in name or (base is not model and id(parameter) not in frozen)
        if parameter.requires_grad:
            trainable.append(name)
    return trainable
