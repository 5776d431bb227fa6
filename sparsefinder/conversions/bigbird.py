"""RoBERTa -> BigBird, and a guard that keeps a BigBird sparse.

BigBird (Zaheer et al., 2020, arXiv:2007.14062) attends to blocks: the first and last block are global, every block
sees its two neighbours and some random blocks. In full-attention mode (`attention_type="original_full"`) it computes
what RoBERTa does, and the conversion is exact on real tokens. What differs underneath, checked against transformers
5.23:
- Positions count from row 0, padding included: the two reserved rows are dropped, and inputs are padded on the right.
- The activation comes from the source (BigBird's own default is gelu_new), embeddings are not rescaled, q, k and v have
  biases.
- Sparse mode needs more than `(5 + 2 num_random_blocks) block_size` tokens. A shorter batch switches the model to full
  attention, and transformers never switches back: `stay_sparse` does.
- Outside training the random blocks are all block 0, and a block that is met twice counts twice: sparse BigBird in
  evaluation has a window and global blocks only, the first of them weighted up. So it is in transformers; nothing here
  changes it.
- Sparse mode ignores causality: a decoder is converted in full-attention mode; before 5.18 that ignores it, too.
"""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    BigBirdConfig,
    BigBirdForCausalLM,
    BigBirdForMaskedLM,
    BigBirdForMultipleChoice,
    BigBirdForQuestionAnswering,
    BigBirdForSequenceClassification,
    BigBirdForTokenClassification,
    BigBirdModel,
    PretrainedConfig,
    PreTrainedModel,
)

from sparsefinder.conversions.bert_names import bert_name, head_is_exact
from sparsefinder.conversions.length_guard import guard_length, input_length
from sparsefinder.conversions.positions import tile_rows
from sparsefinder.conversions.roberta_source import (
    Source,
    base_of,
    build,
    carried_settings,
    check_length,
    lengthened_tokenizer,
    read_roberta,
)
from sparsefinder.conversions.weights import load_in_two_passes
from sparsefinder.errors import UserError

logger = logging.getLogger(__name__)

HEADS: dict[str, type[PreTrainedModel]] = {
    "Model": BigBirdModel,
    "ForMaskedLM": BigBirdForMaskedLM,
    "ForCausalLM": BigBirdForCausalLM,
    "ForSequenceClassification": BigBirdForSequenceClassification,
    "ForTokenClassification": BigBirdForTokenClassification,
    "ForQuestionAnswering": BigBirdForQuestionAnswering,
    "ForMultipleChoice": BigBirdForMultipleChoice,
}
"""Heads that RoBERTa and BigBird both have."""

EXACT_HEADS = ("Model", "ForTokenClassification", "ForMultipleChoice")
"""Heads with RoBERTa's function. Sequence classification has the model's activation where RoBERTa has tanh, and
question answering another layer: their weights come along and their logits differ."""

SPARSE, FULL = "block_sparse", "original_full"

CAUSAL_SINCE = Version("5.18")
"""The first transformers whose BigBird hides the future from a decoder."""


def convert_roberta_to_bigbird(
    roberta_model: PreTrainedModel,
    roberta_tokenizer: Any,
    bigbird_max_length: int = 4096,
    attention_type: str = SPARSE,
    block_size: int = 64,
    num_random_blocks: int = 3,
) -> tuple[PreTrainedModel, Any]:
    """A BigBird with the weights of a RoBERTa, for longer inputs, and its tokenizer.

    Token i reads the source's row `i mod (source length)`. Sparse mode pads inputs to whole blocks inside, so the position table
    is rounded up to a multiple of `block_size`. The model that is returned stays sparse (`stay_sparse`); call that again for one
    that is loaded later. Some of BigBird's heads carry a pooler that they never use and RoBERTa's lack: it is new, and frozen.

    Args:
        roberta_model: a RoBERTa, XLM-RoBERTa or CamemBERT of any size, without a head or with one of `HEADS`; it is left as it
            is.
        roberta_tokenizer: its tokenizer.
        bigbird_max_length: longest input in tokens, not below the source's.
        attention_type: `block_sparse` or `original_full`; a decoder always gets the latter.
        block_size: tokens in a block.
        num_random_blocks: random blocks that each block sees.

    Returns:
        The model, and a tokenizer that cuts at `bigbird_max_length`.

    Raises:
        UserError: for another family, a tokenizer of another vocabulary, a length below the source's, an attention type, block
            size or number of random blocks that BigBird does not know, and a decoder where transformers is older than
            `CAUSAL_SINCE`.
    """
    source = read_roberta(roberta_model, roberta_tokenizer, HEADS, "bigbird")
    if source.config.is_decoder and Version(transformers.__version__) < CAUSAL_SINCE:
        raise UserError(
            f"BigBird decoders of transformers {transformers.__version__} see the future: install {CAUSAL_SINCE} or later"
        )
    length = check_length(source.length, bigbird_max_length, "bigbird_max_length")
    _check_blocks(attention_type, block_size, num_random_blocks)
    settings = {
        **carried_settings(source.config, roberta_tokenizer),
        "max_position_embeddings": -(-length // block_size) * block_size,
        "attention_type": FULL if source.config.is_decoder else attention_type,
        "block_size": block_size,
        "num_random_blocks": num_random_blocks,
        "rescale_embeddings": False,
        "use_bias": True,
    }
    if source.head == "ForQuestionAnswering":
        # This head makes token types of its own, 0 for the question and 1 for the rest.
        settings["type_vocab_size"] = max(2, source.config.type_vocab_size)
    config = BigBirdConfig(**settings)
    arguments = {} if source.head != "Model" else {"add_pooling_layer": source.base.pooler is not None}
    model = build(HEADS[source.head], config, source.model, **arguments)
    base = base_of(model)
    state = _bigbird_state(source, "" if base is model else f"{model.base_model_prefix}.", config)
    added = {name: tensor for name, tensor in _new_weights(source, model).items() if name not in state}
    load_in_two_passes(model, state, added=added)
    for name in added:
        if "pooler" in name:
            # Nothing computes with it, and a parameter without a gradient stops distributed training.
            model.get_parameter(name).requires_grad_(False)
    guard_length(base, length)
    stay_sparse(model)
    if not head_is_exact(source, EXACT_HEADS):
        logger.warning("BigBird's %s head computes something else than RoBERTa's: its logits differ", source.head)
    return model, lengthened_tokenizer(roberta_tokenizer, length, padding_side="right")


def longest_full_input(config: PretrainedConfig) -> int:
    """Up to how many tokens a sparse BigBird attends to everything: `(5 + 2 num_random_blocks) block_size`."""
    return int((5 + 2 * config.num_random_blocks) * config.block_size)


def runs_sparse(model: PreTrainedModel, length: int) -> bool:
    """Whether an input of `length` tokens really runs sparse: what a sparsity figure must be about."""
    base: Any = base_of(model)
    return base.attention_type == SPARSE and length > longest_full_input(model.config)


@contextmanager
def full_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run a BigBird with full attention for a while; afterwards its layers are the very ones that it had."""
    base: Any = base_of(model)
    kept = None if base.attention_type == FULL else [layer.attention.self for layer in base.encoder.layer]
    if kept is not None:
        # Switching builds layers with random weights before it hands the real ones over.
        with torch.random.fork_rng(devices=[]):
            base.set_attention_type(FULL)
    try:
        yield
    finally:
        if kept is not None:
            for layer, sparse in zip(base.encoder.layer, kept, strict=True):
                layer.attention.self = sparse
                layer.attention.attention_type = layer.attention_type = SPARSE
            base.encoder.attention_type = base.attention_type = SPARSE


class stay_sparse:
    """Make a BigBird return to the attention it had after every batch that is too short for block-sparse attention.

    `stay_sparse(model)` holds until `remove()`; `with stay_sparse(model): …` for a while. A short batch itself still
    runs with full attention, as transformers does it, but the global random state is left alone and the layers keep
    their parameters. In training with gradient checkpointing the return waits for the next batch, since the backward
    pass runs the layers again.

    Args:
        model: a BigBird model, with or without a head.

    Raises:
        UserError: for a model that is no BigBird.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        base = base_of(model) if isinstance(model, PreTrainedModel) else None
        if not isinstance(base, BigBirdModel):
            raise UserError(f"a {type(model).__name__} is no BigBird; stay_sparse keeps only BigBird models sparse")
        self._short_batch: AbstractContextManager[None] | None = None
        self._handles = [
            base.register_forward_pre_hook(self._before, with_kwargs=True),
            base.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Let the model behave as transformers' again."""
        self._restore()
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> "stay_sparse":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _before(self, base: BigBirdModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._restore()
        if base.attention_type == SPARSE and input_length(args, kwargs) <= longest_full_input(base.config):
            self._short_batch = full_attention(base)
            self._short_batch.__enter__()

    def _after(self, base: BigBirdModel, args: tuple[Any, ...], output: Any) -> None:
        # Checkpointed layers run again in the backward pass, with the attention that they had: wait for the next batch.
        if not (base.training and base.encoder.layer[0].gradient_checkpointing):
            self._restore()

    def _restore(self) -> None:
        if self._short_batch is not None:
            self._short_batch.__exit__(None, None, None)
            self._short_batch = None


def _bigbird_state(source: Source, prefix: str, config: PretrainedConfig) -> dict[str, Tensor]:
    state = {}
    for name, tensor in source.state().items():
        name = bert_name(name, prefix).replace(f"{prefix}pooler.dense.", f"{prefix}pooler.")
        state["qa_classifier." + name if name.startswith("qa_outputs.") else name] = tensor
    state[f"{prefix}embeddings.position_embeddings.weight"] = tile_rows(
        source.positions, config.max_position_embeddings, reserved=source.reserved, target_reserved=0
    )
    types = f"{prefix}embeddings.token_type_embeddings.weight"
    spare = config.type_vocab_size - len(state[types])
    state[types] = torch.cat([state[types], state[types][:1].expand(spare, -1)])
    return state


def _new_weights(source: Source, model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights of BigBird's heads that RoBERTa has no counterpart for, so that they do as little as they can.

    Poolers keep their fresh values. The layer before the question-answering head, LN(W₂ act(W₁ x) + x), gets W₂ =
    0, and a norm whose scale and shift are about those of its input x = g ⊙ n + b, the output of the last layer's
    norm: √(mean(g²) + var(b)) and mean(b).
    """
    fresh = model.state_dict()
    added = {name: tensor for name, tensor in fresh.items() if ".pooler." in name}
    if source.head != "ForQuestionAnswering":
        return added
    norm = source.base.get_submodule("encoder.layer")[-1].output.LayerNorm
    scale = (norm.weight.float().square().mean() + norm.bias.float().var(correction=0)).sqrt()
    layer = {
        name: tensor
        for name, tensor in fresh.items()
        if name.startswith(("qa_classifier.intermediate", "qa_classifier.output."))
    }
    layer["qa_classifier.output.dense.weight"] = torch.zeros_like(layer["qa_classifier.output.dense.weight"])
    layer["qa_classifier.output.dense.bias"] = torch.zeros_like(layer["qa_classifier.output.dense.bias"])
    ones = torch.ones_like(layer["qa_classifier.output.LayerNorm.weight"])
    layer["qa_classifier.output.LayerNorm.weight"] = ones * scale.to(ones)
    layer["qa_classifier.output.LayerNorm.bias"] = ones * norm.bias.float().mean().to(ones)
    return {**added, **layer}


def _check_blocks(attention_type: Any, block_size: Any, num_random_blocks: Any) -> None:
    if attention_type not in (SPARSE, FULL):
        raise UserError(f"attention_type is {attention_type!r}; needed: {SPARSE} or {FULL}")
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise UserError(f"block_size is {block_size!r}; needed: a number of tokens above 0, e.g. 64")
    if isinstance(num_random_blocks, bool) or not isinstance(num_random_blocks, int) or num_random_blocks < 1:
        raise UserError(f"num_random_blocks is {num_random_blocks!r}; needed: a whole number, 1 or more, e.g. 3")
