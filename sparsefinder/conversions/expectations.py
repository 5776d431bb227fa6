"""Where each target must equal its source, and which tables are to be audited: what `proof` measures by."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsefinder.conversions import bigbird, led, longformer, nystromformer
from sparsefinder.conversions.bert_names import head_is_exact
from sparsefinder.conversions.roberta_source import base_of, read_roberta
from sparsefinder.errors import UserError
from sparsefinder.models.position_tables import reserved_rows

EXACT = 1e-4
"""Largest difference of a hidden state or logit that counts as the same function."""


@dataclass(frozen=True)
class Comparison:
    """What to compare a converted model with, and where it must be equal."""

    positions: Callable[[PreTrainedModel], Mapping[str, Tensor]]
    """Position tables of the target by what they are for."""
    source_reserved: int
    target_reserved: int
    equal_up_to: int
    """Longest input in tokens on which the hidden states must be the source's."""
    source_length: int
    length: int
    """Longest input of the target in tokens."""
    settings: dict[str, Any]
    equal_mode: Callable[[int], Any] = lambda length: nullcontext()
    """A context in which the target computes the source's function on inputs of that many tokens."""
    mode: str = ""
    """Words for `equal_mode`."""
    own_mode: Callable[[], Any] | None = None
    """A context for the target's own attention at the source's maximum length; None where that is no approximation."""
    head_exact: bool = True
    shift: Tensor | None = None
    """What the target's position rows hold beside the source's."""
    global_tokens: bool = False
    """Whether to compare with a global first token too."""
    padded_to: int = 1
    """The target pads to a multiple of this inside."""


def compare(target: Any, tokenizer: Any, source: Any) -> Comparison:
    """How a converted model is to be compared with the model it was made from.

    Args:
        target: the converted model.
        tokenizer: that of the target.
        source: the model before.

    Returns:
        Which inputs both can read, and which parts of their outputs and position tables must agree.

    Raises:
        UserError: for a target that this package does not make, or a source that the target is not made from.
    """
    readers = {
        "longformer": _compare_longformer,
        "nystromformer": _compare_nystromformer,
        "big_bird": _compare_bigbird,
        "led": _compare_led,
    }
    kind = getattr(getattr(target, "config", None), "model_type", None)
    if kind not in readers:
        raise UserError(f"a {type(target).__name__} is none of the targets {', '.join(readers)}; convert a model first")
    return readers[kind](target, tokenizer, source)


def _compare_longformer(target: Any, tokenizer: Any, source: Any) -> Comparison:
    reserved = reserved_rows("after_padding", source.config.pad_token_id)
    rows = len(base_of(source).embeddings.position_embeddings.weight)
    windows = target.config.attention_window
    source_length = rows - reserved
    covered = source_length if source.config.model_type == "longformer" else min(source_length, min(windows) // 2 + 1)
    return Comparison(
        positions=lambda model: {"position table": base_of(model).embeddings.position_embeddings.weight},
        source_reserved=reserved,
        target_reserved=reserved,
        equal_up_to=covered,
        source_length=source_length,
        length=target.config.max_position_embeddings - reserved,
        settings={"max_length": target.config.max_position_embeddings - reserved, "attention_window": windows},
        mode="the window covers the input",
        own_mode=nullcontext if covered < source_length else None,
        global_tokens=True,
    )


def _compare_nystromformer(target: Any, tokenizer: Any, source: Any) -> Comparison:
    parts = read_roberta(source, tokenizer, nystromformer.HEADS, "nystromformer")
    config = target.config
    # The largest number of landmarks, up to the configured one, that cuts the source's length into equal segments.
    number = max(n for n in range(1, min(config.num_landmarks, parts.length) + 1) if parts.length % n == 0)
    approximate = config.num_landmarks < config.segment_means_seq_len
    return Comparison(
        positions=lambda model: {"position table": base_of(model).embeddings.position_embeddings.weight},
        own_mode=(lambda: nystromformer.landmarks(target, number, parts.length)) if approximate else None,
        source_reserved=parts.reserved,
        target_reserved=nystromformer.RESERVED,
        equal_up_to=parts.length,
        source_length=parts.length,
        length=config.max_position_embeddings,
        settings={"max_length": config.max_position_embeddings, "num_landmarks": config.num_landmarks},
        equal_mode=lambda length: nystromformer.landmarks(target, length, length),
        mode="as many landmarks as tokens",
        head_exact=head_is_exact(parts, nystromformer.EXACT_HEADS),
    )


def _compare_bigbird(target: Any, tokenizer: Any, source: Any) -> Comparison:
    parts = read_roberta(source, tokenizer, bigbird.HEADS, "bigbird")
    config = target.config
    length = min(int(tokenizer.model_max_length), config.max_position_embeddings)
    return Comparison(
        positions=lambda model: {"position table": base_of(model).embeddings.position_embeddings.weight},
        source_reserved=parts.reserved,
        target_reserved=0,
        equal_up_to=parts.length,
        source_length=parts.length,
        length=length,
        settings={
            "max_length": length,
            "attention_type": config.attention_type,
            "block_size": config.block_size,
            "num_random_blocks": config.num_random_blocks,
        },
        equal_mode=lambda length: bigbird.full_attention(target),
        mode="full-attention mode",
        own_mode=nullcontext if bigbird.runs_sparse(target, parts.length) else None,
        head_exact=head_is_exact(parts, bigbird.EXACT_HEADS),
        padded_to=config.block_size,
    )


def _compare_led(target: Any, tokenizer: Any, source: Any) -> Comparison:
    base = longformer.read_longformer(source, tokenizer)
    reserved = reserved_rows("after_padding", source.config.pad_token_id)
    length = len(base.embeddings.position_embeddings.weight) - reserved
    same_norms = source.config.layer_norm_eps == led.LAYER_NORM_EPS
    return Comparison(
        positions=lambda model: {
            "encoder's position table": base_of(model).encoder.embed_positions.weight,
            "decoder's position table": base_of(model).decoder.embed_positions.weight,
        },
        source_reserved=reserved,
        target_reserved=0,
        equal_up_to=length,
        source_length=length,
        length=length,
        settings={
            "max_length": length,
            "decoder_output_max_length": target.config.max_decoder_position_embeddings,
            "attention_window": target.config.attention_window,
        },
        equal_mode=lambda length: _norms(target, source.config.layer_norm_eps),
        mode="encoder" if same_norms else "encoder, with the source's layer_norm_eps, which LED cannot keep",
        own_mode=None if same_norms else nullcontext,
        head_exact=False,
        shift=base.embeddings.token_type_embeddings.weight[0],
        global_tokens=True,
        padded_to=max(target.config.attention_window),
    )


@contextmanager
def _norms(model: nn.Module, eps: float) -> Iterator[None]:
    """Every layer norm of the model with `eps`, for a while."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    before = [norm.eps for norm in norms]
    try:
        for norm in norms:
            norm.eps = eps
        yield
    finally:
        for norm, own in zip(norms, before, strict=True):
            norm.eps = own
