"""RoBERTa -> Longformer, and a Longformer -> a longer one.

Longformer (Beltagy, Peters and Cohan, 2020, arXiv:2004.05150) is RoBERTa with another attention: each token sees a
window of `attention_window // 2` tokens to either side, and tokens marked in `global_attention_mask` see and are seen
by all, through projections of their own. These start as copies of the local ones, so that an input that the window
covers gets exactly RoBERTa's hidden states on its real tokens, with and without global tokens.

Differences from LennartKeller/roberta2longformer, whose names and arguments these are: the position table repeats the
rows of tokens and is written at all (the published versions that we read leave it as the new model has it); the whole
configuration comes from the source, so that every size loads; token types, pooler and heads come along;
`sep_token_id`, which the question-answering heads look for, comes from the tokenizer; `resize_longformer` refuses to
shorten.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import (
    LongformerConfig,
    LongformerForMaskedLM,
    LongformerForMultipleChoice,
    LongformerForQuestionAnswering,
    LongformerForSequenceClassification,
    LongformerForTokenClassification,
    LongformerModel,
    PreTrainedModel,
)

from sparsefinder.conversions.length_guard import guard_length
from sparsefinder.conversions.positions import tile_rows
from sparsefinder.conversions.roberta_source import (
    base_of,
    build,
    carried_settings,
    check_length,
    check_tokenizer,
    lengthened_tokenizer,
    read_roberta,
)
from sparsefinder.conversions.weights import load_in_two_passes
from sparsefinder.errors import UserError
from sparsefinder.models.position_tables import reserved_rows

HEADS: dict[str, type[PreTrainedModel]] = {
    "Model": LongformerModel,
    "ForMaskedLM": LongformerForMaskedLM,
    "ForSequenceClassification": LongformerForSequenceClassification,
    "ForTokenClassification": LongformerForTokenClassification,
    "ForQuestionAnswering": LongformerForQuestionAnswering,
    "ForMultipleChoice": LongformerForMultipleChoice,
}
"""Heads that RoBERTa and Longformer both have."""

DEFAULT_WINDOW = 512
SMALLEST_WINDOW = 4
"""transformers 5.23 cannot run a window of 2: its chunks of one token overlap by none."""
_POSITIONS = "embeddings.position_embeddings.weight"


def convert_roberta_to_longformer(
    roberta_model: PreTrainedModel,
    roberta_tokenizer: Any,
    longformer_max_length: int = 4096,
    attention_window: int | Sequence[int] = DEFAULT_WINDOW,
) -> tuple[PreTrainedModel, Any]:
    """A Longformer with the weights of a RoBERTa, for longer inputs, and its tokenizer.

    Token i reads the source's row `i mod (source length)`. Inputs need not be a multiple of the window: transformers pads them
    inside, with padding tokens that read the padding row.

    Args:
        roberta_model: a RoBERTa, XLM-RoBERTa or CamemBERT of any size, without a head or with one of `HEADS`; it is left as it
            is.
        roberta_tokenizer: its tokenizer.
        longformer_max_length: longest input in tokens, not below the source's.
        attention_window: even, one for all layers or one for each, at most `longformer_max_length`; 512, the default, is accepted
            for shorter models too.

    Returns:
        The model, with the source's dtype, device and training mode, and a tokenizer that cuts at `longformer_max_length`.

    Raises:
        UserError: for another family, a head that Longformer lacks, a tokenizer of another vocabulary, a length below the
            source's, and a window that is odd, too small, too large or, among several, does not divide the largest.
    """
    source = read_roberta(roberta_model, roberta_tokenizer, HEADS, "longformer")
    length = check_length(source.length, longformer_max_length, "longformer_max_length")
    windows = check_window(attention_window, length, source.config.num_hidden_layers)
    settings = {
        **carried_settings(source.config, roberta_tokenizer),
        "max_position_embeddings": source.reserved + length,
        "attention_window": windows,
    }
    config = LongformerConfig(**settings)
    arguments = {} if source.head != "Model" else {"add_pooling_layer": source.base.pooler is not None}
    model = build(HEADS[source.head], config, source.model, **arguments)
    prefix = _prefix(model)
    state = {_renamed(name, prefix): tensor for name, tensor in source.state().items()}
    state[prefix + _POSITIONS] = tile_rows(source.positions, length, reserved=source.reserved)
    load_in_two_passes(model, state, added=_global_copies(state))
    guard_length(base_of(model), length)
    return model, lengthened_tokenizer(roberta_tokenizer, length)


def resize_longformer(
    model: PreTrainedModel, tokenizer: Any, longformer_max_length: int = 4096
) -> tuple[PreTrainedModel, Any]:
    """A copy of a Longformer, with any head, for longer inputs, and its tokenizer.

    Windows, global projections and head stay as they are; token i reads the row `i mod (length so far)`.

    Args:
        model: a Longformer; it is left as it is.
        tokenizer: its tokenizer.
        longformer_max_length: longest input in tokens, not below the model's.

    Returns:
        The copy, and a tokenizer that cuts at `longformer_max_length`.

    Raises:
        UserError: for a model that is no Longformer, a tokenizer of another vocabulary and a length below the model's.
    """
    base = read_longformer(model, tokenizer)
    reserved = reserved_rows("after_padding", model.config.pad_token_id)
    table = base.embeddings.position_embeddings.weight.data
    length = check_length(len(table) - reserved, longformer_max_length, "longformer_max_length")
    config = LongformerConfig(**carried_settings(model.config, tokenizer), max_position_embeddings=reserved + length)
    arguments = {} if base is not model else {"add_pooling_layer": base.pooler is not None}
    resized = build(type(model), config, model, **arguments)
    state = dict(model.state_dict())
    state[_prefix(model) + _POSITIONS] = tile_rows(table, length, reserved=reserved)
    load_in_two_passes(resized, state, added={})
    guard_length(base_of(resized), length)
    return resized, lengthened_tokenizer(tokenizer, length)


def read_longformer(model: Any, tokenizer: Any) -> Any:
    """The Longformer without its head; raises `UserError` if it is none, or if the tokenizer has another vocabulary."""
    base = base_of(model) if isinstance(model, PreTrainedModel) else None
    if not isinstance(base, LongformerModel):
        what = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise UserError(f"{what} is no Longformer; load one, or make one with convert_roberta_to_longformer")
    check_tokenizer(model, tokenizer)
    return base


def check_window(window: Any, length: int, layers: int) -> list[int]:
    """One window for each of `layers` layers; `UserError` unless they are even, 4 to `length`, and divide the largest."""
    windows = list(window) if isinstance(window, Sequence) and not isinstance(window, str) else [window] * layers
    if len(windows) != layers:
        raise UserError(f"attention_window has {len(windows)} entries for {layers} layers; give one number or one each")
    for size in windows:
        if isinstance(size, bool) or not isinstance(size, int) or size < SMALLEST_WINDOW or size % 2:
            raise UserError(
                f"attention_window is {size!r}; needed: an even number of tokens, {SMALLEST_WINDOW} or more, half of it to "
                "either side"
            )
        if size > length and size != DEFAULT_WINDOW:
            raise UserError(
                f"attention_window {size} is larger than the maximum length {length}; needed: an even number up to it"
            )
    if any(max(windows) % size for size in windows):
        # transformers pads the input once for all layers, to a multiple of the largest window.
        raise UserError(
            f"attention_window {windows}: the largest is no multiple of each; choose windows that divide it"
        )
    return windows


def _prefix(model: PreTrainedModel) -> str:
    return "" if base_of(model) is model else f"{model.base_model_prefix}."


def _renamed(name: str, prefix: str) -> str:
    return prefix + name.removeprefix("base.") if name.startswith("base.") else name


def _global_copies(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections for global tokens, as copies of the local ones: `….query.weight` -> `….query_global.weight`."""
    return {
        name.replace(f".self.{part}.", f".self.{part}_global."): tensor
        for name, tensor in state.items()
        for part in ("query", "key", "value")
        if f".self.{part}." in name
    }
