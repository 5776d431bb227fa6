"""Convert a plain checkpoint into an LSG model for long inputs, or lengthen an LSG model.

The arguments are those of the published command line (`scripts/convert_checkpoint.py`), and so is the result: the same
tables of positions and of global tokens. The model works at once, without save and reload.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsefinder.conversions.certificate import Certificate
from sparsefinder.conversions.positions import check_target_length
from sparsefinder.conversions.roberta_source import lengthened_tokenizer
from sparsefinder.conversions.staging import refuse_existing
from sparsefinder.errors import UserError
from sparsefinder.executors.local_sparse_global.attention import SOFTMAX
from sparsefinder.lsg.configuration import config_class
from sparsefinder.lsg.embedding_tables import global_rows, global_table, lengthen_positions, position_tables, word_table
from sparsefinder.lsg.equivalence import certify, normalizer_of, save
from sparsefinder.lsg.families import Family, architecture_of, family_of, plain_class
from sparsefinder.lsg.loading import IGNORED, check_config, is_lsg, load
from sparsefinder.lsg.modeling import model_class
from sparsefinder.models import set_normalizer
from sparsefinder.models.checkpoints import Checkpoint, check_that_it_runs, load_config, load_tokenizer, open_checkpoint
from sparsefinder.models.learned_heads import refuse_heads
from sparsefinder.models.transformers_internals import forget_attention
from sparsefinder.numerics.normalizers import Normalizer

log = logging.getLogger(__name__)

_DENSE_NORMALIZER = ("attention_alpha", "attn_implementation")  # what a plain model remembers; `normalizer_alpha` here


def convert(
    initial_model: str | Path,
    model_name: str | Path | None = None,
    max_sequence_length: int = 4096,
    *,
    architecture: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    random_global_init: bool = False,
    global_positional_stride: int = 64,
    keep_first_global_token: bool = False,
    resize_lsg: bool = False,
    use_token_ids: bool = True,
    seed: int = 123,
    **settings: Any,
) -> tuple[Any, Any]:
    """The LSG model made of a plain checkpoint, or of a shorter LSG model.

    Args:
        initial_model: a folder, or a name on the hub.
        model_name: folder to save the result in, with its certificate; None to keep it in memory (it is checked all the same).
        max_sequence_length: longest input in tokens, not below the source's.
        architecture: its class, by default the one that the checkpoint names; a new head is drawn from `seed`, and so is one of
            another size (`num_labels`).
        model_kwargs: settings of the configuration (`sparsity_type`, `block_size`, …); `normalizer_alpha` is by default the α
            that the source attends with.
        random_global_init: draw the global tokens after the first from the distribution of the words.
        global_positional_stride: distance, in tokens, of the positions of the global tokens.
        keep_first_global_token: of an LSG model, keep its first global token.
        resize_lsg: of an LSG model, only lengthen the positions.
        use_token_ids: add token type 0 to the global tokens (ALBERT, BERT, ELECTRA).
        seed: of what is drawn.
        **settings: further settings of the configuration.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        UserError: for a model type or architecture without LSG form, wrong settings, a maximum length below the source's, a
            tokenizer whose mask id has no embedding, an existing folder, and a check that fails.
    """
    if model_name is not None:
        refuse_existing(model_name)
    checkpoint = open_checkpoint(initial_model)
    raw = checkpoint.settings
    family = family_of(raw.get("model_type"))
    plain = architecture_of(family, architecture or next(iter(raw.get("architectures") or ()), None))
    was_lsg = is_lsg(raw)
    for flag, given in (("resize_lsg", resize_lsg), ("keep_first_global_token", keep_first_global_token)):
        if given and not was_lsg:
            log.warning("%s has no effect: %s is no LSG model", flag, initial_model)
    chosen = {**(model_kwargs or {}), **settings}
    plain_config = None if was_lsg else load_config(checkpoint)
    config = _configuration(raw, family, chosen)
    _check_length(config, family, max_sequence_length)
    source = _source(checkpoint, family, plain, plain_config)
    tokenizer = load_tokenizer(checkpoint, len(word_table(source)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls, resized = model_class(f"LSG{plain}"), "num_labels" in chosen
        model = load(checkpoint, cls, family, makes_globals=True, new_head=resized, config=config)
    own, sources = normalizer_of(model), normalizer_of(source)
    if own != sources:
        log.warning("%s attends with alpha %s, the LSG model with %s", initial_model, sources.alpha, own.alpha)
    table = global_table(model, family)
    if table is not None and not (was_lsg and resize_lsg):
        first = 1 if was_lsg and keep_first_global_token else 0
        rows = _global_tokens(
            model, tokenizer, family, random_global_init, global_positional_stride, use_token_ids, seed
        )
        table.weight.data[first:] = rows[first:]
    lengthen_positions(model, family, max_sequence_length)
    tokenizer = lengthened_tokenizer(tokenizer, max_sequence_length)
    certificate = Certificate(
        source=str(initial_model),
        target="lsg",
        settings={
            "architecture": plain,
            "max_sequence_length": max_sequence_length,
            "random_global_init": random_global_init,
            "global_positional_stride": global_positional_stride,
            "seed": seed,
            **{name: getattr(config, name) for name in config.lsg_fields},
        },
    )
    certificate = certify(model, tokenizer, source, family, certificate)
    certificate.require()
    if model_name is not None:
        model.config.name_or_path = str(model_name)
        save(model, tokenizer, certificate, model_name)
    return model, tokenizer


def _configuration(raw: dict[str, Any], family: Family, settings: dict[str, Any]) -> Any:
    made = config_class(family)
    kept = {name: value for name, value in raw.items() if name not in (*IGNORED, *_DENSE_NORMALIZER)}
    unknown = sorted(set(settings) - {*made.__dataclass_fields__, *made.attribute_map, "num_labels", *kept})
    if unknown:
        raise UserError(
            f"unknown setting {', '.join(unknown)}; LSG has {', '.join(made.lsg_fields)}, and the fields of "
            f"{family.stem}Config"
        )
    if "num_labels" in settings and settings["num_labels"] != len(kept.get("id2label") or ()):
        # beside the checkpoint's names of labels, another number of them would go unheard
        kept = {name: value for name, value in kept.items() if name not in ("id2label", "label2id")}
    if not is_lsg(raw):
        kept["normalizer_alpha"] = _normalizer(raw).alpha
    return check_config(made, {**kept, **settings})


def _check_length(config: Any, family: Family, length: Any) -> None:
    if not isinstance(length, int) or isinstance(length, bool):
        raise UserError(f"max_sequence_length is {length!r}; a whole number of tokens is needed")
    check_target_length(family.tokens(config), length)


def _source(checkpoint: Checkpoint, family: Family, plain: str, config: Any) -> Any:
    """The model to compare with: the checkpoint as it is; `config` is None for one that is an LSG model already."""
    raw = checkpoint.settings
    if config is None:
        return load(checkpoint, model_class(f"LSG{plain}"), family, config=_configuration(raw, family, {}))
    forget_attention(config)
    source = load(checkpoint, plain_class(plain), family, config=config)
    check_that_it_runs(source, checkpoint.label)
    if _normalizer(raw) != SOFTMAX:
        if family.encoder_decoder:
            raise UserError(
                f"{checkpoint.label} attends with entmax (attention_alpha) in its decoder too, where an LSG model has softmax; "
                "take attention_alpha out of its config.json, or convert a model without a decoder"
            )
        set_normalizer(source, _normalizer(raw))
    return source


def _normalizer(raw: dict[str, Any]) -> Normalizer:
    """What a plain checkpoint attends with."""
    refuse_heads(raw, "an LSG model")
    try:
        return Normalizer(raw.get("attention_alpha", 1.0))
    except (TypeError, ValueError) as error:
        raise UserError(f"attention_alpha in the source's config.json is wrong: {error}") from error


def _global_tokens(
    model: Any, tokenizer: Any, family: Family, drawn: bool, stride: int, use_token_ids: bool, seed: int
) -> torch.Tensor:
    config = model.config
    first_tokens = (
        tokenizer.bos_token_id, tokenizer.cls_token_id, config.bos_token_id,
        getattr(config, "decoder_start_token_id", None), config.pad_token_id,
    )  # fmt: skip
    bos_id = next((token_id for token_id in first_tokens if token_id is not None), 0)
    if not drawn and tokenizer.mask_token_id is None:
        raise UserError("the tokenizer has no mask token to build global tokens from; use random_global_init")
    positions = next(iter(position_tables(model, family).values())).weight.data[family.reserved(config) :]
    typed = use_token_ids and family.globals_have_type
    return global_rows(
        word_table(model),
        positions,
        bos_id,
        None if drawn else tokenizer.mask_token_id,
        stride=stride,
        token_type=model.base_model.embeddings.token_type_embeddings.weight.data[0] if typed else None,
        seed=seed,
    )
