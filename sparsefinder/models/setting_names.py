"""What a family's configuration calls a setting of a new model, where not as most do: a name that it does not know is ignored."""

from __future__ import annotations

from typing import Any

SHARE_KEYS = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3")  # families whose heads may share keys
_OTHER_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "distilbert": {
        "intermediate_size": ("hidden_dim",),
        "hidden_dropout_prob": ("dropout",),
        "attention_probs_dropout_prob": ("attention_dropout",),
    },
    "gpt2": {
        "intermediate_size": ("n_inner",),
        "hidden_dropout_prob": ("resid_pdrop", "embd_pdrop"),
        "attention_probs_dropout_prob": ("attn_pdrop",),
        "layer_norm_eps": ("layer_norm_epsilon",),
    },
    "gpt_neox": {"hidden_dropout_prob": ("hidden_dropout",), "attention_probs_dropout_prob": ("attention_dropout",)},
    **{
        family: {"attention_probs_dropout_prob": ("attention_dropout",), "layer_norm_eps": ("rms_norm_eps",)}
        for family in SHARE_KEYS
    },
    **{
        family: {
            "hidden_size": ("d_model",),
            "num_hidden_layers": ("encoder_layers", "decoder_layers"),
            "num_attention_heads": ("encoder_attention_heads", "decoder_attention_heads"),
            "intermediate_size": ("encoder_ffn_dim", "decoder_ffn_dim"),
            "hidden_dropout_prob": ("dropout",),
            "attention_probs_dropout_prob": ("attention_dropout",),
            "initializer_range": ("init_std",),
            "eos_token_id": ("eos_token_id", "decoder_start_token_id"),
        }
        for family in ("bart", "mbart", "pegasus", "marian")
    },
    "t5": {
        "hidden_size": ("d_model",),
        "num_hidden_layers": ("num_layers", "num_decoder_layers"),
        "num_attention_heads": ("num_heads",),
        "intermediate_size": ("d_ff",),
        "hidden_dropout_prob": ("dropout_rate",),
        "eos_token_id": ("eos_token_id", "decoder_start_token_id"),
    },
    "modernbert": {
        "hidden_dropout_prob": ("embedding_dropout", "mlp_dropout"),
        "attention_probs_dropout_prob": ("attention_dropout",),
        "layer_norm_eps": ("norm_eps",),
        "bos_token_id": ("bos_token_id", "cls_token_id"),
        "eos_token_id": ("eos_token_id", "sep_token_id"),
    },
}


def in_words_of(family: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a new model by the names that the configuration of its family has for them.

    Args:
        family: Its `model_type`.
        settings: By the names that BERT has.
    """
    names = _OTHER_NAMES.get(family, {})
    return {own: value for name, value in settings.items() for own in names.get(name, (name,))}
