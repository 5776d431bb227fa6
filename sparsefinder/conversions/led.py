"""Longformer -> LED, an encoder-decoder for long inputs.

LED (Beltagy, Peters and Cohan, 2020) is BART with Longformer's attention in the encoder. Its encoder becomes the
Longformer's, which it equals on real tokens. Its decoder starts from the same layers: self-attention and attention to
the encoder both from the global projections (the ones trained to see everything), the rest from the layer itself. It
has to be trained.

What LED of transformers 5.23 lacks, and what becomes of it:
- Token types: their first row is added to both position tables.
- Reserved position rows: dropped. The encoder pads to whole windows inside and reads a row for each padding token, so
  its table is rounded up to a multiple of the largest window; otherwise the longest inputs would index beyond it.
- The layer before the masked-LM head, and the pooler: dropped. The head's bias becomes `final_logits_bias`.
- `layer_norm_eps`: LED's is 1e-5. Where the source's is another, the encoder is close to the source and not equal.

Differences from LennartKeller/roberta2longformer (`longformer2led.py`): token types and embedding norms come along,
the encoder's table is rounded up, reserved rows are counted from the padding id, heads come along.
"""

from typing import Any

from torch import Tensor
from transformers import (
    LEDConfig,
    LEDForConditionalGeneration,
    LEDForQuestionAnswering,
    LEDModel,
    PreTrainedModel,
)

from sparsefinder.conversions.length_guard import guard_length
from sparsefinder.conversions.longformer import read_longformer
from sparsefinder.conversions.positions import tile_rows
from sparsefinder.conversions.roberta_source import base_of, build, lengthened_tokenizer
from sparsefinder.conversions.weights import load_in_two_passes
from sparsefinder.errors import UserError
from sparsefinder.models.position_tables import reserved_rows

HEADS: dict[str, type[PreTrainedModel]] = {
    "LongformerModel": LEDModel,
    "LongformerForMaskedLM": LEDForConditionalGeneration,
    "LongformerForQuestionAnswering": LEDForQuestionAnswering,
}
"""Longformer classes and what they become."""

LAYER_NORM_EPS = 1e-5
"""What LED's layer norms add to the variance, whatever the configuration."""

_SHARED_PARTS = {
    "intermediate.dense": ("fc1",),
    "output.dense": ("fc2",),
    "output.LayerNorm": ("final_layer_norm",),
}
_ENCODER_PARTS = {
    **{
        f"attention.self.{part}{kind}": (f"self_attn.longformer_self_attn.{part}{kind}",)
        for part in ("query", "key", "value")
        for kind in ("", "_global")
    },
    "attention.output.dense": ("self_attn.output",),
    "attention.output.LayerNorm": ("self_attn_layer_norm",),
    **_SHARED_PARTS,
}
_DECODER_PARTS = {
    **{
        f"attention.self.{part}_global": (f"self_attn.{part[0]}_proj", f"encoder_attn.{part[0]}_proj")
        for part in ("query", "key", "value")
    },
    "attention.output.dense": ("self_attn.out_proj", "encoder_attn.out_proj"),
    "attention.output.LayerNorm": ("self_attn_layer_norm", "encoder_attn_layer_norm"),
    **_SHARED_PARTS,
}


def convert_longformer_to_led(
    longformer_model: PreTrainedModel, longformer_tokenizer: Any, decoder_output_max_length: int = 4096
) -> tuple[PreTrainedModel, Any]:
    """An LED whose encoder is a Longformer and whose decoder is initialised from it, and its tokenizer.

    Output token i reads the row `i mod (longest input)`. Generation begins with the end-of-sentence token, as in BART.

    Args:
        longformer_model: a Longformer of any size: without a head (-> `LEDModel`), for masked language modelling (->
            `LEDForConditionalGeneration`) or question answering; it is left as it is.
        longformer_tokenizer: its tokenizer.
        decoder_output_max_length: longest output in tokens; inputs may be as long as the Longformer's.

    Returns:
        The model, and a tokenizer that cuts at the longest input.

    Raises:
        UserError: for a model that is no Longformer, another head, a tokenizer of another vocabulary and an output length below
            1.
    """
    base = read_longformer(longformer_model, longformer_tokenizer)
    name = type(longformer_model).__name__
    if name not in HEADS:
        raise UserError(f"{name} has no counterpart in led; convert one of {', '.join(HEADS)}")
    outputs = decoder_output_max_length
    if isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1:
        raise UserError(f"decoder_output_max_length is {outputs!r}; needed: a number of tokens above 0, e.g. 1024")
    source = longformer_model.config
    reserved = reserved_rows("after_padding", source.pad_token_id)
    length = len(base.embeddings.position_embeddings.weight) - reserved
    windows = list(source.attention_window)
    rounded = -(-length // max(windows)) * max(windows)
    model = build(HEADS[name], _led_config(source, windows, rounded, outputs), longformer_model)
    state, dropped = _led_state(longformer_model, reserved, rounded, outputs)
    if "final_logits_bias" in state:
        state["lm_head.weight"] = longformer_model.lm_head.decoder.weight.data
    load_in_two_passes(model, state, added={}, dropped=dropped)
    led = base_of(model)
    guard_length(led.get_submodule("encoder"), length)
    guard_length(led.get_submodule("decoder"), outputs)
    return model, lengthened_tokenizer(longformer_tokenizer, length)


def _led_config(source: Any, windows: list[int], inputs: int, outputs: int) -> LEDConfig:
    eos = source.eos_token_id[0] if isinstance(source.eos_token_id, list) else source.eos_token_id
    return LEDConfig(
        vocab_size=source.vocab_size,
        max_encoder_position_embeddings=inputs,
        max_decoder_position_embeddings=outputs,
        d_model=source.hidden_size,
        encoder_layers=source.num_hidden_layers,
        decoder_layers=source.num_hidden_layers,
        encoder_attention_heads=source.num_attention_heads,
        decoder_attention_heads=source.num_attention_heads,
        encoder_ffn_dim=source.intermediate_size,
        decoder_ffn_dim=source.intermediate_size,
        activation_function=source.hidden_act,
        dropout=source.hidden_dropout_prob,
        attention_dropout=source.attention_probs_dropout_prob,
        init_std=source.initializer_range,
        pad_token_id=source.pad_token_id,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        decoder_start_token_id=eos,
        attention_window=windows,
        tie_word_embeddings=source.tie_word_embeddings,
        id2label=source.id2label,
        label2id=source.label2id,
    )


def _led_state(model: PreTrainedModel, reserved: int, inputs: int, outputs: int) -> tuple[dict[str, Tensor], set[str]]:
    """LED's weights by name, and the names of those that it has no counterpart for."""
    base = base_of(model)
    longformer = "" if base is model else "longformer."
    led = "" if base is model else "led."
    source = model.state_dict()
    state: dict[str, Tensor] = {}
    dropped: set[str] = set()
    for name, tensor in source.items():
        short = name.removeprefix(longformer)
        if short.startswith("encoder.layer."):
            number, _, rest = short.removeprefix("encoder.layer.").partition(".")
            part, _, kind = rest.rpartition(".")
            for side, parts in (("encoder", _ENCODER_PARTS), ("decoder", _DECODER_PARTS)):
                for module in parts.get(part, ()):
                    state[f"{led}{side}.layers.{number}.{module}.{kind}"] = tensor
        elif short == "embeddings.word_embeddings.weight":
            for module in ("shared", "encoder.embed_tokens", "decoder.embed_tokens"):
                state[f"{led}{module}.weight"] = tensor
        elif short.startswith("embeddings.LayerNorm."):
            for side in ("encoder", "decoder"):
                state[f"{led}{side}.layernorm_embedding.{short.rpartition('.')[2]}"] = tensor
        elif name == "lm_head.bias":
            state["final_logits_bias"] = tensor[None]
        elif name.startswith("qa_outputs."):
            state[name] = tensor
        elif not short.startswith("embeddings."):
            state[name] = tensor
            dropped.add(name)
    table = source[f"{longformer}embeddings.position_embeddings.weight"]
    types = source[f"{longformer}embeddings.token_type_embeddings.weight"]
    for side, rows in (("encoder", inputs), ("decoder", outputs)):
        tiled = tile_rows(table, max(rows, len(table) - reserved), reserved=reserved, target_reserved=0)
        state[f"{led}{side}.embed_positions.weight"] = tiled[:rows] + types[0]
    return state, dropped
