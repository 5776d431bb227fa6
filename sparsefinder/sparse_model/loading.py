"""``sparsefinder.load``: a model and its index from one folder, or one repository of the hub."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from sparsefinder.errors import UserError
from sparsefinder.models.checkpoints import load_model, open_checkpoint
from sparsefinder.models.replacement import attach_and_detach
from sparsefinder.models.transformers_internals import cached_file
from sparsefinder.sparse_model.attaching import Attachment, check_fit, put, transformer_of
from sparsefinder.sparse_model.index import Attached, Index, hash_of_weights
from sparsefinder.sparse_model.index_files import DESCRIPTION, NUMBERS, read_files

log = logging.getLogger(__name__)


def load(name_or_path: str | Path, auto_class: Any = None, **options: Any) -> Any:
    """A model with the index that lies beside its weights attached, as it was saved.

    Args:
        name_or_path: A folder that ``save_pretrained`` wrote while an index was attached, or a name on the hub.
        auto_class: A class of transformers such as ``AutoModelForSequenceClassification``; None for the class that was saved.
        **options: For ``from_pretrained``: ``revision``, ``token``, ``dtype``, ….

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: For a folder whose model or index is missing, cut or altered.
    """
    names = ("revision", "subfolder", "token", "cache_dir")
    where = {name: options.pop(name) for name in names if name in options}
    checkpoint = open_checkpoint(name_or_path, **where)
    if auto_class is None:
        named = next(iter(checkpoint.settings.get("architectures") or ()), "AutoModel")
        auto_class = getattr(transformers, named, None)
        if auto_class is None:
            raise UserError(
                f"{checkpoint.label}: its architecture {named} is no class of transformers: give auto_class="
            )
    model, _ = load_model(checkpoint, auto_class, **options)
    if attach_and_detach.owner_of(model) is None:
        raise UserError(
            f"{checkpoint.label} holds a model without an index: save it with save_pretrained while one is attached, or attach "
            "one with sparsefinder.attach"
        )
    return model


def attach_what_lies_beside(model: PreTrainedModel, name: str, where: dict[str, Any]) -> None:
    """What ``from_pretrained`` does for a model whose configuration says that an index lies beside its weights.

    Args:
        model: As it was loaded, in evaluation mode.
        name: The folder or repository.
        where: ``revision``, ``subfolder`` and so on.

    Raises:
        UserError: The index is missing, cut, altered, or that of another model.
    """
    paths = []
    for file in (DESCRIPTION, NUMBERS):
        try:
            paths.append(Path(cached_file(name, file, **where)))
        except OSError as error:
            raise UserError(
                f"{name}: its config.json says that an index lies beside it, and {file} is missing: copy {DESCRIPTION} and "
                f"{NUMBERS} too, or take the line sparsefinder_index out of config.json for dense attention"
            ) from error
    index = read_files(*paths)
    encoder = transformer_of(model)
    check_fit(index, encoder, another_base_model=False)
    put(encoder, index, index.attached or Attached())


def write_beside(model: PreTrainedModel, attachment: Attachment, folder: Path) -> None:
    """Write the index of a model that was just saved into its folder."""
    weights = hash_of_weights(model.base_model)
    saved_with = "" if weights == attachment.index.base.content else weights
    replace(attachment.index, attached=attachment.setting, saved_with=saved_with).save(folder)


__all__ = ["Index", "attach_what_lies_beside", "load", "write_beside"]
