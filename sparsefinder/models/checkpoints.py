"""One guarded way to load what others saved: configuration, weights and tokenizer of a folder, or of a name on the hub.

    checkpoint = open_checkpoint("roberta-base")
    model, new = load_model(checkpoint, AutoModelForSequenceClassification, num_labels=3)
    tokenizer = load_tokenizer(checkpoint, rows=len(model.get_input_embeddings().weight))

Whatever is wrong with a checkpoint ends in a `UserError` of one line, which names the file or the setting: pointer files and
cut downloads, quantized weights, missing and superfluous layers, a tokenizer of another version or none at all, settings that
cannot be meant. No code that comes with a checkpoint is ever run, and pickles are read as tensors only.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sparsefinder.errors import UserError
from sparsefinder.models.checkpoint_files import wrong_file, wrong_vocabulary, wrong_weights
from sparsefinder.models.checkpoint_settings import check_sizes, wrong_content
from sparsefinder.models.transformers_internals import cached_file
from sparsefinder.storage import hub

log = logging.getLogger(__name__)

_LARGEST_WEIGHT = 1e12  # far above any that was trained, far below one whose square is infinite
_OTHER_FORMAT = "did not match any variant of untagged enum"  # what tokenizers says to what it does not know
_RELATIVE = "distance_embedding"  # weights of relative positions, which transformers 5 leaves out


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose `config.json` has been read and looked at; nothing is loaded yet."""

    name: str
    """Its folder, or its name on the hub."""
    label: str
    """What messages call it, such as ``model=roberta-base``."""
    settings: dict[str, Any]
    """The content of its `config.json`."""
    where: dict[str, Any] = field(default_factory=dict)
    """What every loader is given: whether to ask the hub, and for which revision."""

    @property
    def folder(self) -> Path | None:
        """Its folder; None for a name on the hub."""
        path = Path(self.name, self.where.get("subfolder") or "")
        return path if path.is_dir() else None


# ---- the parts of a checkpoint ----


def open_checkpoint(name_or_path: str | Path, *, label: str | None = None, **where: Any) -> Checkpoint:
    """Find a checkpoint and read its `config.json`.

    Args:
        name_or_path: a folder, or a name on the hub.
        label: what messages call it; by default its name.
        **where: `revision`, `subfolder`, `token`, `cache_dir` for the hub.

    Returns:
        The checkpoint, whose weights and tokenizer are not read yet.

    Raises:
        UserError: for a path that is not there, an unreachable hub, and settings that cannot be used here.
    """
    name = str(name_or_path)
    label = name if label is None else label
    where = {"local_files_only": _must_be_local(name, label), **where}
    unread = Checkpoint(name, label, {}, where)
    if unread.folder and not (unread.folder / "config.json").is_file():
        raise UserError(f"{label}: this folder has no config.json; give one written by save_pretrained")
    file = Path(_guarded(unread, "configuration", lambda: cached_file(name, "config.json", **where)))
    try:
        wrong = wrong_file(file)
        content = {} if wrong else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{label}: cannot read its config.json ({hub.in_words(error)})") from error
    if wrong:
        raise UserError(f"{label}: cannot read its configuration: {wrong}")
    if wrong := wrong_content(content):
        raise UserError(f"{label}: in its config.json {wrong}")
    return Checkpoint(name, label, content, where)


def load_config(checkpoint: Checkpoint, **settings: Any) -> Any:
    """The configuration, with sizes that can be meant; ``settings`` override what it says."""
    options = {"trust_remote_code": False, **checkpoint.where, **settings}
    config = _guarded(checkpoint, "configuration", lambda: AutoConfig.from_pretrained(checkpoint.name, **options))
    check_sizes(config, checkpoint.label)
    return config


def load_model(
    checkpoint: Checkpoint,
    model_class: Any,
    *,
    new_head: bool = False,
    may_lack: Callable[[str], bool] = lambda key: False,
    **options: Any,
) -> tuple[Any, set[str]]:
    """A model in evaluation mode; and the weights that it draws anew.

    A checkpoint may lack a head or a pooler, but only as a whole (the log names it).

    Args:
        checkpoint: an opened checkpoint.
        model_class: a model class or an Auto class.
        new_head: whether the head may have another size in the checkpoint; then it is drawn anew.
        may_lack: which other weights, by name, may be missing, for a caller that fills the gap.
        **options: for `from_pretrained`: `config`, `dtype`, settings of the configuration.

    Returns:
        The model, and the names of the weights that were drawn anew.

    Raises:
        UserError: for weights that are damaged, or of another architecture than ``model_class`` has.
    """
    if checkpoint.folder and (wrong := wrong_weights(checkpoint.folder)):
        raise UserError(f"{checkpoint.label}: cannot read its weights: {wrong}")
    options = {"trust_remote_code": False, "weights_only": True, **checkpoint.where, **options}
    with quiet():
        model, loading_info = _guarded(
            *(checkpoint, "weights"),
            lambda: model_class.from_pretrained(
                checkpoint.name, output_loading_info=True, ignore_mismatched_sizes=new_head, **options
            ),
        )
    resized = {key for key, *_ in loading_info["mismatched_keys"]}
    missing = {*loading_info["missing_keys"]}
    lacked = {key for key in missing if not may_lack(key)}
    _check_fit(checkpoint, model, lacked, resized, loading_info["unexpected_keys"])
    if lacked or resized:
        log.warning("%s has no %s: drawn anew, train them", checkpoint.name, ", ".join(sorted(lacked | resized)))
    return model, missing | resized


def load_tokenizer(checkpoint: Checkpoint, rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint, whose ids are all among the word embeddings.

    Args:
        checkpoint: an opened checkpoint.
        rows: how many word embeddings the model has.

    Returns:
        The tokenizer.

    Raises:
        UserError: for a tokenizer that cannot be read, has no vocabulary (transformers 5 then makes one of special tokens), or
            has ids beyond ``rows``.
    """
    folder, label = checkpoint.folder, checkpoint.label
    if folder and (wrong := wrong_vocabulary(folder)):
        raise UserError(f"{label}: cannot read its tokenizer: {wrong}")
    options = {"trust_remote_code": False, **checkpoint.where}
    with quiet():
        tokenizer: PreTrainedTokenizerBase = _guarded(
            checkpoint, "tokenizer", lambda: AutoTokenizer.from_pretrained(checkpoint.name, **options)
        )
    if folder and not (folder / "tokenizer.json").is_file():
        needed = {name for key, name in tokenizer.vocab_files_names.items() if key != "tokenizer_file"}
        if absent := sorted(name for name in needed if not (folder / name).is_file()):
            raise UserError(
                f"{label}: its tokenizer lacks {', '.join(absent)}: save it into the folder, or a tokenizer.json"
            )
    vocabulary = tokenizer.get_vocab()
    if (
        len(vocabulary.keys() - {*tokenizer.all_special_tokens}) < 2
    ):  # MBart's invented one has a blank beside the special ones
        raise UserError(
            f"{label}: its tokenizer has no words but {len(vocabulary)} special tokens, its vocabulary is not there: save the "
            "tokenizer into the folder with save_pretrained"
        )
    check_vocabulary(tokenizer, rows, label)
    return tokenizer


def check_vocabulary(tokenizer: Any, rows: int, label: str) -> None:
    """Raise `UserError` if a token has no word embedding (distilled BART: the mask id equals the vocabulary size)."""
    for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        token_id = getattr(tokenizer, f"{role}_token_id", None)
        if token_id is not None and not 0 <= token_id < rows:
            raise UserError(
                f"{label}: the tokenizer's {role} id {token_id} is outside the model's vocabulary of {rows}; enlarge the "
                "embeddings (resize_token_embeddings) and save the model, or give it the right tokenizer"
            )
    needed = max([len(tokenizer), *(index + 1 for index in tokenizer.get_vocab().values())])
    if needed > rows:
        raise UserError(
            f"{label}: its tokenizer has another vocabulary: it needs {needed} word embeddings and the model has {rows}; give "
            "the tokenizer that the model was trained with"
        )


def check_that_it_runs(model: PreTrainedModel, label: str) -> None:
    """A damaged configuration may fit the weights and fail at the first input; a damaged weight may be no number."""
    try:
        ids = torch.full((1, 2), min(4, model.config.vocab_size - 1), device=model.device)
        inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
        with torch.inference_mode():
            output: Any = model.base_model(**inputs)
            finite = output[0].isfinite().all()
            sane = all((weight.abs() < _LARGEST_WEIGHT).all() for weight in model.parameters())  # NaN is below nothing
    except Exception as error:  # whatever the model's code does with a value it was not made for
        raise UserError(f"{label}: cannot be run, its config.json may be damaged ({hub.in_words(error)})") from error
    if not finite or not sane:
        raise UserError(
            f"{label}: its weights contain NaN or numbers above {_LARGEST_WEIGHT:.0e}, or lead to such; the checkpoint is damaged"
        )


# ---- weights that do not fit ----


def gaps(model: PreTrainedModel, missing: Collection[str], *, same_head: bool = True) -> list[str]:
    """Of the weights that a checkpoint lacks those that it must have, sorted: all but a head, or a pooler, gone as a whole.

    Some of a head gone is damage, unless the checkpoint has not the ``same_head``: others share some of its names.
    """
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."

    def part(key: str) -> str:
        if not key.startswith(prefix):
            return "head"
        return "pooler" if key.startswith(f"{prefix}pooler.") else "body"

    wrong = {key for key in missing if part(key) == "body"}
    for name in ("head", "pooler") if same_head else ("pooler",):
        gone = {key for key in missing if part(key) == name}
        # tied weights have other names in a report: a head with one of these is gone as a whole
        if gone < {key for key, _ in model.named_parameters() if part(key) == name}:
            wrong |= gone
    return sorted(wrong)


def _check_fit(
    checkpoint: Checkpoint, model: PreTrainedModel, missing: set[str], resized: set[str], unexpected: Collection[str]
) -> None:
    kind, label = type(model).__name__, checkpoint.label
    saved = next(iter(checkpoint.settings.get("architectures") or ()), "")
    if wrong := gaps(model, missing, same_head=saved.removeprefix("LSG") == kind.removeprefix("LSG")):
        raise UserError(
            f"{label}: {len(wrong)} of its weights are not in the checkpoint, the first is {wrong[0]}; it is damaged or of "
            f"another architecture than {kind}"
        )
    body = sorted(key for key in resized if model.base_model is model or key.startswith(f"{model.base_model_prefix}."))
    if body:
        raise UserError(f"{label}: {body[0]} has another size there than in its {kind}; only the head may have")
    if any(_RELATIVE in key for key in unexpected):
        raise UserError(
            f"{label}: it was trained with relative positions (it has weights {_RELATIVE}), which transformers 5 drops without a "
            "word: give a model that was trained with absolute ones"
        )

    def unnumbered(key: str) -> str:
        return re.sub(r"\.\d+\.", ".N.", key.removeprefix(f"{model.base_model_prefix}."))

    known = {unnumbered(key) for key, _ in model.named_parameters()}
    if layers := sorted(key for key in unexpected if re.search(r"\.\d+\.", key) and unnumbered(key) in known):
        raise UserError(
            f"{label}: its weights have more layers than its config.json says, the first too many is {layers[0]}: correct "
            "num_hidden_layers"
        )


# ---- whatever the loaders of others raise ----


def _must_be_local(name: str, label: str) -> bool:
    """Whether only files of this machine can be used; a `UserError` for what is neither a folder nor a name."""
    if Path(name).is_dir():
        return True
    if Path(name).exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(
            f"{label}: there is no such folder, and it is no name of the Hugging Face hub; "
            "give a folder written by save_pretrained or a name such as roberta-base"
        )
    return not hub.reachable()


def _guarded(checkpoint: Checkpoint, what: str, load: Callable[[], Any]) -> Any:
    label = checkpoint.label
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # OSError, ValueError, SafetensorError, KeyError, a bare one: they have no common type
        if _is_code(error):
            raise UserError(
                f"{label}: cannot read its {what}: its pickle is damaged or holds more than tensors, and code of a checkpoint is "
                "never run; give one with model.safetensors"
            ) from error
        if _OTHER_FORMAT in str(error):
            raise UserError(
                f"{label}: its tokenizer.json was written by another version of tokenizers than the {version('tokenizers')} here "
                f"({hub.in_words(error)}): update it (pip install -U tokenizers), or save the tokenizer again with this version"
            ) from error
        local = checkpoint.where["local_files_only"] and checkpoint.folder is None
        absent = f"{what} of that name are not in its cache; connect, or give the path of a folder written by save_pretrained"
        raise hub.refusal(label, error, f": cannot read its {what}", absent if local else "") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' reports of missing and unexpected weights off the screen: what matters of them is said here."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _is_code(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, pickle.UnpicklingError):
        error = error.__cause__ or error.__context__
    return error is not None
