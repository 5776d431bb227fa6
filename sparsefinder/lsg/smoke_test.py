"""Try a saved LSG model under every Auto class that fits it, as `--run_test` of the command line does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.lsg.equivalence import sample
from sparsefinder.lsg.families import Family, family_of
from sparsefinder.lsg.loading import load
from sparsefinder.models.checkpoints import Checkpoint, load_tokenizer, open_checkpoint
from sparsefinder.storage.hub import in_words


def try_heads(folder: str | Path) -> Iterator[str]:
    """Load `folder` by each Auto class, run it in bfloat16 on an input of its maximum length; one line of outcome each.

    Heads that the checkpoint has no weights for, or weights of another size (of a classifier with other labels), are drawn at
    random: this shows that they run, not what they know. A decoder alone has no encoder for other heads than its own. Raises
    `UserError` at the end, where one did not run.
    """
    checkpoint = open_checkpoint(folder)
    family = family_of(checkpoint.settings["model_type"])
    saved = next(iter(checkpoint.settings.get("architectures") or ()), "")
    decoder_only = family.encoder_decoder and saved.endswith("ForCausalLM")
    autos = {
        auto: name for auto, name in family.auto_classes().items() if not decoder_only or auto == "AutoModelForCausalLM"
    }
    failed = []
    for auto, name in autos.items():
        try:
            outcome = _try_head(checkpoint, family, auto)
        except Exception as error:  # whatever a model's code says to a head that it was not made for
            outcome = f"FAILED ({in_words(error)})"
            failed.append(auto)
        yield f"{auto} → LSG{name}: {outcome}"
    if "AutoModelForMaskedLM" in autos:
        model = load(checkpoint, transformers.AutoModelForMaskedLM, family, new_head=True)
        tokenizer: Any = load_tokenizer(checkpoint, model.config.vocab_size)
        if tokenizer.mask_token is not None:
            guess = transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer)
            yield f"fill-mask: {guess(f'Paris is the {tokenizer.mask_token} of France.')[0]['sequence']}"
    if failed:
        raise UserError(
            f"{folder} is saved and whole, but {', '.join(failed)} cannot run it: report this with the lines above"
        )


def _try_head(checkpoint: Checkpoint, family: Family, auto: str) -> str:
    given = {"is_decoder": True} if auto == "AutoModelForCausalLM" and not family.encoder_decoder else {}
    model = load(checkpoint, getattr(transformers, auto), family, new_head=True, dtype=torch.bfloat16, **given)
    ids, mask = sample(model, family.tokens(model.config))
    with torch.no_grad():
        outputs = model(**_inputs(model, auto, ids, mask))
    tensors = [value for value in outputs.values() if isinstance(value, Tensor)]
    finite = "finite" if all(bool(torch.isfinite(tensor).all()) for tensor in tensors) else "NOT FINITE"
    return f"{ids.shape[1]} tokens → {tuple(tensors[0].shape)}, {finite}"


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
