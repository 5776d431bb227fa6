"""RoBERTa -> Nyströmformer.

Nyströmformer (Xiong et al., 2021, arXiv:2102.03902) replaces softmax(QKᵀ/√D) V by

    softmax(Q K̃ᵀ/√D) · pinv(softmax(Q̃ K̃ᵀ/√D)) · (softmax(Q̃ Kᵀ/√D) V)  +  conv(V),

where Q̃ and K̃ are means over segments of the input ("landmarks"), pinv is six steps of an iteration, and conv is a depthwise
convolution over the tokens. The convolution starts at zero, so that the source's function is kept.

What transformers 5.23 does, and what follows for the defaults here:

- With as many landmarks as the configured length has tokens (`num_landmarks == segment_means_seq_len`) it computes the full
  softmax attention, for inputs of any length up to the maximum: then the conversion is exact, and quadratic. That is
  the default. (The published function leaves both at 64 and gets the same full attention without saying so.)
- With fewer, each input must have exactly `segment_means_seq_len` tokens; another length fails, or, when batch times length
  happens to be a multiple of it, silently mixes the sentences of a batch. The model returned here refuses such inputs.
- Landmarks are means over padding too, and the first two factors are not masked: below the full number of landmarks, outputs
  depend on padding. The iteration does not run in half precision.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    NystromformerConfig,
    NystromformerForMaskedLM,
    NystromformerForMultipleChoice,
    NystromformerForQuestionAnswering,
    NystromformerForSequenceClassification,
    NystromformerForTokenClassification,
    NystromformerModel,
    PreTrainedModel,
)

from sparsefinder.conversions.bert_names import bert_name, head_is_exact
from sparsefinder.conversions.length_guard import guard_length, input_length
from sparsefinder.conversions.positions import tile_rows
from sparsefinder.conversions.roberta_source import (
    base_of,
    build,
    carried_settings,
    check_length,
    lengthened_tokenizer,
    read_roberta,
)
from sparsefinder.conversions.weights import load_in_two_passes
from sparsefinder.errors import UserError
from sparsefinder.models.transformers_internals import nystromformer_attention

logger = logging.getLogger(__name__)

HEADS: dict[str, type[PreTrainedModel]] = {
    "Model": NystromformerModel,
    "ForMaskedLM": NystromformerForMaskedLM,
    "ForSequenceClassification": NystromformerForSequenceClassification,
    "ForTokenClassification": NystromformerForTokenClassification,
    "ForQuestionAnswering": NystromformerForQuestionAnswering,
    "ForMultipleChoice": NystromformerForMultipleChoice,
}
"""Heads that RoBERTa and Nyströmformer both have."""

EXACT_HEADS = ("Model", "ForTokenClassification", "ForQuestionAnswering")
"""Heads with RoBERTa's function. Sequence classification has the model's activation where RoBERTa has tanh, multiple
choice relu: their weights come along and their logits differ."""

RESERVED = 2
"""Leading rows of Nyströmformer's position table that no token uses, whatever the padding id."""


def convert_roberta_to_nystromformer(
    roberta_model: PreTrainedModel,
    roberta_tokenizer: Any,
    nystromformer_max_length: int = 4096,
    num_landmarks: int | None = None,
    conv_kernel_size: int = 65,
) -> tuple[PreTrainedModel, Any]:
    """A Nyströmformer with the weights of a RoBERTa, for longer inputs, and its tokenizer.

    Token i reads the source's row `i mod (source length)`; positions count tokens from the left, padding included, so the
    tokenizer pads on the right. RoBERTa's pooler has no counterpart but in multiple choice.

    Args:
        roberta_model: a RoBERTa, XLM-RoBERTa or CamemBERT of any size, without a head or with one of `HEADS`; it is left as it
            is.
        roberta_tokenizer: its tokenizer.
        nystromformer_max_length: longest input in tokens, not below the source's.
        num_landmarks: None for as many landmarks as tokens: full attention, the source's hidden states, inputs of any length. A
            smaller number, a divisor of the maximum length, is the approximation, for inputs padded to exactly that length.
        conv_kernel_size: odd, in tokens.

    Returns:
        The model, and a tokenizer that cuts at `nystromformer_max_length`.

    Raises:
        UserError: for another family, a head that Nyströmformer lacks, a tokenizer of another vocabulary, a length below the
            source's, and landmarks or kernel sizes that do not fit.
    """
    source = read_roberta(roberta_model, roberta_tokenizer, HEADS, "nystromformer")
    length = check_length(source.length, nystromformer_max_length, "nystromformer_max_length")
    landmarks = length if num_landmarks is None else num_landmarks
    check_landmarks(landmarks, length)
    if isinstance(conv_kernel_size, bool) or not isinstance(conv_kernel_size, int) or conv_kernel_size % 2 != 1:
        raise UserError(f"conv_kernel_size is {conv_kernel_size!r}; needed: an odd number of tokens, e.g. 65")
    settings = {
        **carried_settings(source.config, roberta_tokenizer),
        "max_position_embeddings": length,
        "segment_means_seq_len": length,
        "num_landmarks": landmarks,
        "conv_kernel_size": conv_kernel_size,
    }
    model = build(HEADS[source.head], NystromformerConfig(**settings), source.model)
    prefix = "" if source.head == "Model" else f"{model.base_model_prefix}."
    state = {bert_name(name, prefix): tensor for name, tensor in source.state().items()}
    state[f"{prefix}embeddings.position_embeddings.weight"] = tile_rows(
        source.positions, length, reserved=source.reserved, target_reserved=RESERVED
    )
    pooler = {name.rpartition(".")[2]: name for name in state if name.startswith(f"{prefix}pooler.dense.")}
    if source.head == "ForMultipleChoice":
        state.update({f"pre_classifier.{part}": state.pop(name) for part, name in pooler.items()})
        pooler = {}
    convolutions = {
        name: torch.zeros_like(tensor)
        for name, tensor in model.state_dict().items()
        if name.endswith("attention.self.conv.weight")
    }
    load_in_two_passes(model, state, added=convolutions, dropped=pooler.values())
    guard_length(base_of(model), length)
    guard_segments(model)
    if not head_is_exact(source, EXACT_HEADS):
        logger.warning("Nyströmformer's %s head has another activation than RoBERTa's: its logits differ", source.head)
    return model, lengthened_tokenizer(roberta_tokenizer, length, padding_side="right")


def check_landmarks(num_landmarks: Any, length: int) -> None:
    """Raise `UserError` unless `num_landmarks` is a whole number that divides `length`, so that segments are equal."""
    whole = isinstance(num_landmarks, int) and not isinstance(num_landmarks, bool)
    if not whole or num_landmarks < 1 or length % num_landmarks:
        raise UserError(
            f"num_landmarks is {num_landmarks!r} for a length of {length} tokens; needed: a divisor of the length, "
            "or None for as many landmarks as tokens"
        )


def guard_segments(model: PreTrainedModel) -> RemovableHandle:
    """Make a Nyströmformer refuse, with a `UserError`, inputs that its landmarks do not fit.

    Below the full number of landmarks transformers cuts batch times length into segments; an input of another length
    than the configured one fails there or mixes sentences. Returns torch's handle: `handle.remove()` takes the guard
    off.
    """
    return base_of(model).register_forward_pre_hook(_refuse_other_lengths, with_kwargs=True)


def needed_length(model: nn.Module) -> int | None:
    """The one length in tokens that a Nyströmformer's inputs must have; None if any will do, or for another model."""
    layer = next(_attentions(model), None)
    return None if layer is None or layer.num_landmarks == layer.seq_len else int(layer.seq_len)


def _refuse_other_lengths(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    needed, given = needed_length(base), input_length(args, kwargs)
    if needed is not None and given != needed:
        raise UserError(
            f"input of {given} tokens, and with its landmarks this Nyströmformer needs exactly {needed}; pad it "
            f"(padding='max_length', max_length={needed})"
        )


def _attentions(model: nn.Module) -> Iterator[Any]:
    kind = nystromformer_attention()
    return (module for module in model.modules() if isinstance(module, kind))


@contextmanager
def landmarks(model: nn.Module, num_landmarks: int, length: int) -> Iterator[None]:
    """Run a Nyströmformer with other landmarks and another length than the configured ones, for a while.

    Measures the approximation; afterwards every layer has its own again.

    Args:
        model: holds Nyström attentions, and may hold anything else.
        num_landmarks: landmarks of each layer; as many as `length` is full attention.
        length: tokens of every input, no more and no fewer.

    Yields:
        Nothing; the model is changed in place.

    Raises:
        UserError: if `length` is no multiple of `num_landmarks`.
    """
    check_landmarks(num_landmarks, length)
    layers = list(_attentions(model))
    before = [(layer.num_landmarks, layer.seq_len) for layer in layers]
    try:
        for layer in layers:
            layer.num_landmarks, layer.seq_len = num_landmarks, length
        yield
    finally:
        for layer, (number, tokens) in zip(layers, before, strict=True):
            layer.num_landmarks, layer.seq_len = number, tokens
