"""The index goes where its model goes: ``save_pretrained`` writes it, ``from_pretrained`` attaches it again.

Two methods of transformers' models are wrapped, for models that an index is attached to and folders that hold one, and for no
others. Imports nothing heavy: `teach` waits until transformers is imported (`sparsefinder.models.entmax_configuration`).
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sparsefinder.models.entmax_configuration import INDEX

log = logging.getLogger(__name__)

_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")  # of `from_pretrained`


def teach(module: ModuleType) -> None:
    """Wrap both methods of the class of models in transformers' module; may be called again."""
    base = module.PreTrainedModel
    if hasattr(base, "_keeps_an_index"):
        return
    base._keeps_an_index = True
    save, push, load = base.save_pretrained, base.push_to_hub, base.__dict__["from_pretrained"].__func__

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = _attachment(self)
        self.config.__dict__.pop(INDEX, None)  # of a configuration whose index is elsewhere
        if attachment is None:
            return save(self, save_directory, *args, **kwargs)
        pushed = kwargs.pop("push_to_hub", False)
        named = {
            name: kwargs.pop(name) for name in ("repo_id", "commit_message", "create_pr") if pushed and name in kwargs
        }
        setattr(self.config, INDEX, "sparsefinder.json")
        try:
            saved = save(self, save_directory, *args, **kwargs)
        finally:
            del self.config.__dict__[INDEX]
        from sparsefinder.sparse_model import card, loading

        if kwargs.get("is_main_process", True):
            loading.write_beside(self, attachment, Path(save_directory))
            card.write(attachment, Path(save_directory))
        if pushed:
            repository = named.pop("repo_id", os.path.basename(os.path.normpath(save_directory)))
            self.push_to_hub(repository, **named, **{name: kwargs[name] for name in ("token",) if name in kwargs})
        return saved

    @functools.wraps(push)
    def push_to_hub(self: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        pushed = push(self, repo_id, *args, **kwargs)
        if (
            attachment := _attachment(self)
        ) is not None:  # transformers writes a card of its own over that of the folder
            from sparsefinder.sparse_model import card

            card.push(attachment, repo_id, {name: kwargs.get(name) for name in ("token", "revision", "create_pr")})
        return pushed

    @functools.wraps(load)
    def from_pretrained(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, name, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.__dict__.pop(INDEX, None) and name is not None:
            from sparsefinder.sparse_model import loading

            loading.attach_what_lies_beside(model, str(name), _where(kwargs))
        return loaded

    base.save_pretrained, base.push_to_hub = save_pretrained, push_to_hub
    base.from_pretrained = classmethod(from_pretrained)


def teach_sentence_transformers(module: ModuleType) -> None:
    """Let the card that sentence-transformers writes over that of the model inside say what is attached; may be called again."""
    for name in ("SentenceTransformer", "CrossEncoder"):
        owner = next(each for each in getattr(module, name).__mro__ if "save" in vars(each))
        if not hasattr(owner.save, "_says_what_is_attached"):
            owner.save = _with_card(owner.save)


def _with_card(save: Any) -> Any:
    @functools.wraps(save)
    def save_and_say(self: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        saved = save(self, path, *args, **kwargs)
        from sparsefinder.models.replacement.attach_and_detach import owner_of
        from sparsefinder.sparse_model import card
        from sparsefinder.sparse_model.attaching import Attachment

        if path is not None and (Path(path) / card.CARD).exists():
            owner = owner_of(self)
            if isinstance(owner, Attachment):
                card.write(owner, Path(path))
            else:
                card.forget(Path(path))
        return saved

    save_and_say._says_what_is_attached = True  # type: ignore[attr-defined]
    return save_and_say


def _where(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _WHERE if kwargs.get(name) is not None}


def _attachment(model: Any) -> Any:
    """What is attached to the model as a whole; None where nothing is."""
    if "sparsefinder.models.replacement.attach_and_detach" not in sys.modules:
        return None
    from sparsefinder.models.replacement.attach_and_detach import is_whole, owner_of
    from sparsefinder.sparse_model.attaching import Attachment

    owner = owner_of(model)
    if not isinstance(owner, Attachment):
        return None
    if not is_whole(model):
        log.warning(
            "a part of this %s has an index attached, which is not saved with the whole: save the part",
            type(model).__name__,
        )
        return None
    return owner
