"""RoBERTa's names for weights -> the names of targets that were written after BERT (BigBird, Nyströmformer)."""

from sparsefinder.conversions.roberta_source import Source

_LM_HEAD = {
    "lm_head.dense.": "cls.predictions.transform.dense.",
    "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
    "lm_head.decoder.": "cls.predictions.decoder.",
    "lm_head.bias": "cls.predictions.bias",
}


def bert_name(name: str, prefix: str) -> str:
    """The target's name for what `Source.state` calls `name`; `prefix` stands before the model without its head."""
    if name.startswith("base."):
        return prefix + name.removeprefix("base.")
    for ours, theirs in _LM_HEAD.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def head_is_exact(source: Source, exact: tuple[str, ...]) -> bool:
    """Whether the target's head computes what the source's does, given the heads that are always `exact` there.

    Language-modelling heads are when the model's activation is gelu: RoBERTa's head always uses gelu, BERT's the
    model's activation.
    """
    if source.head in ("ForMaskedLM", "ForCausalLM"):
        return source.config.hidden_act == "gelu"
    return source.head in exact
