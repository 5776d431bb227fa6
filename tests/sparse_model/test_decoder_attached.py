"""An index of a decoder: prompts are read on the graph, words behind a cache densely, and later words change no earlier one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_index import sentences
from tiny_models import tiny_config, tiny_tokenizer
from tokenizers import processors
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import sparsefinder
from sparsefinder.attention import Masked
from sparsefinder.errors import UserError
from sparsefinder.graphs import QK
from sparsefinder.models import plugged, set_normalizer
from sparsefinder.models.observed_attention import Watched
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.sparse_model.attaching import attachment
from sparsefinder.sparse_model.texts import special_tokens
from tests.models.test_decoders import tiny

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "qwen3": {
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 9,
    },
}


def decoder(family: str = "llama", alpha: float = 1.0) -> Any:
    """With large weights, so that attention is no mean, and the special tokens of `tiny_tokenizer`."""
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": None}
    model = tiny(family, initializer_range=0.2, **tokens, **FAMILIES[family])
    if alpha != 1.0:
        set_normalizer(model, Normalizer(alpha))
    return model


def attached(family: str = "llama", alpha: float = 1.0) -> Any:
    model = decoder(family, alpha)
    index = sparsefinder.fit(model, tiny_tokenizer(), sentences())
    sparsefinder.attach(model, index, density=0.1, auto=False)
    return model


def prompt(tokens: int = 30) -> Tensor:
    return torch.randint(5, 12, (1, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **others: Any) -> Tensor:
    return model(ids, use_cache=False, **others).logits


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_attached_is_the_predicted_graph_of_the_past(family: str, alpha: float) -> None:
    model, plain, ids = attached(family, alpha), decoder(family, alpha), prompt()
    found, dense = logits(model, ids), logits(plain, ids)
    index, setting = attachment(model).index, attachment(model).setting
    with plugged(plain, Masked(index.attention(setting).pattern, index.normalizer, causal=True)):
        torch.testing.assert_close(found, logits(plain, ids), atol=1e-4, rtol=1e-4)
    assert (found - dense).norm() > 1e-3 * dense.norm()  # or nothing was attached
    later = ids.clone()
    later[:, 20:] = 7
    assert torch.equal(logits(model, later)[:, :20], found[:, :20])
    sparsefinder.detach(model)
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_words_behind_a_cache_attend_densely_to_all_that_was_read(family: str, alpha: float) -> None:
    model, plain, ids = attached(family, alpha), decoder(family, alpha), prompt()
    read = model(ids, use_cache=True)
    assert torch.equal(read.logits, logits(model, ids))
    again = model(ids, use_cache=True)
    found = model(ids[:, :3], past_key_values=read.past_key_values).logits
    torch.testing.assert_close(
        found, plain(ids[:, :3], past_key_values=again.past_key_values).logits, atol=1e-4, rtol=1e-4
    )


@torch.no_grad()
def test_generation_is_that_of_each_prompt_alone() -> None:
    model, ids = attached(), prompt()
    alone = [model.generate(each, max_new_tokens=6, do_sample=False)[0, -6:] for each in (ids, ids[:, :21])]
    batch, valid = torch.ones(2, 30, dtype=torch.long), torch.ones(2, 30, dtype=torch.long)
    batch[0], batch[1, 9:], valid[1, :9] = ids[0], ids[0, :21], 0
    together = model.generate(batch, attention_mask=valid, max_new_tokens=6, do_sample=False)[:, -6:]
    assert torch.equal(together, torch.stack(alone))


def test_explained_and_saved(tmp_path: Path) -> None:
    model, ids = attached(), prompt()
    told = sparsefinder.explain(model, [ids])
    index, setting = attachment(model).index, attachment(model).setting
    densities: dict[int, Tensor] = {}
    masked = Masked(index.attention(setting).pattern, index.normalizer, causal=True)

    def look(layer: int, qk: QK, v: Tensor, output: Tensor) -> None:
        densities[layer] = masked.graph(qk, layer)[0].double().sum((1, 2)) / (30 * 31 / 2)

    model.save_pretrained(tmp_path)
    found = logits(model, ids)
    sparsefinder.detach(model)
    with plugged(model, Watched(masked, look)):
        logits(model, ids)
    # of the first layer, whose queries and keys are those of the dense model
    of_first = torch.tensor([row["density"] for row in told.heads if row["layer"] == 0], dtype=torch.float64)
    torch.testing.assert_close(of_first, densities[0], atol=1e-9, rtol=1e-9)
    assert 0 < of_first.mean() < 1
    assert torch.equal(logits(sparsefinder.load(tmp_path), ids), found)


def test_a_pattern_that_reads_ahead_is_refused() -> None:
    with pytest.raises(UserError, match=r"pattern=quantize reads ahead in a decoder \(a token is ranked among all"):
        sparsefinder.fit(decoder(), tiny_tokenizer(), sentences(), pattern="quantize")


def test_an_encoder_that_is_configured_as_a_decoder_is_refused() -> None:
    config = tiny_config("roberta", is_decoder=True)
    with pytest.raises(UserError, match="an encoder configured as a decoder; an index needs is_decoder=false"):
        sparsefinder.fit(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), sentences())


def test_special_tokens_on_either_side() -> None:
    tokenizer = tiny_tokenizer()
    assert special_tokens(tokenizer) == ([0], [2])
    for template, expected in (("<s> $A", ([0], [])), ("$A </s>", ([], [2])), ("$A", ([], []))):
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        assert special_tokens(PreTrainedTokenizerFast(tokenizer_object=backend)) == expected
