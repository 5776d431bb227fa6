"""Try a saved LSG model under every Auto class that fits it, as `--run_test` of the command line does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sparsefinder.lsg.families import family_of
from sparsefinder.lsg.loading import quiet, read_config
from sparsefinder.lsg.proof import sample


def try_heads(folder: str | Path) -> Iterator[str]:
    """Load `folder` by each Auto class, run it in bfloat16 on an input of its maximum length; one line of outcome each.

    Heads that the checkpoint has no weights for are drawn at random: this shows that they run, not what they know.
    """
    family = family_of(read_config(folder).get("model_type"))
    for auto, name in family.auto_classes().items():
        decodes = auto == "AutoModelForCausalLM" and not family.encoder_decoder
        given = {"is_decoder": True} if decodes else {}
        with quiet():
            model = getattr(transformers, auto).from_pretrained(folder, dtype=torch.bfloat16, **given)
        ids, mask = sample(model, family.tokens(model.config))
        with torch.no_grad():
            outputs = model(**_inputs(model, auto, ids, mask))
        tensors = [value for value in outputs.values() if isinstance(value, Tensor)]
        finite = "finite" if all(bool(torch.isfinite(tensor).all()) for tensor in tensors) else "NOT FINITE"
        yield f"{auto} → LSG{name}: {ids.shape[1]} tokens → {tuple(tensors[0].shape)}, {finite}"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.mask_token is not None and "AutoModelForMaskedLM" in family.auto_classes():
        model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
        guess = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
        yield f"fill-mask: {guess(f'Paris is the {tokenizer.mask_token} of France.')[0]['sequence']}"


def _inputs(model: Any, auto: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    inputs = {"input_ids": ids, "attention_mask": mask}
    if auto == "AutoModelForMultipleChoice":
        return {name: tensor[:, None] for name, tensor in inputs.items()}
    if auto == "AutoModelForSequenceClassification" and model.config.is_encoder_decoder:
        ids[ids == model.config.eos_token_id] = model.config.pad_token_id
        ids[:, -1] = model.config.eos_token_id  # its head reads the last end-of-text token, of which there must be one
        return inputs
    if model.config.is_encoder_decoder and auto != "AutoModelForCausalLM":
        inputs["decoder_input_ids"] = ids[:, :16]
    return inputs
