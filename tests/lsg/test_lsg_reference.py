"""Agreement with the published converter and its models, on its own numbers (`tests/data/lsg`)."""

import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsefinder.lsg import convert, from_pretrained

DATA = Path(__file__).parents[1] / "data" / "lsg"
STRIDES = {11: 1, 45: 5, 133: 5, 700: 23}  # positions of the logits that were kept, by input length


@cache
def cases(name):
    return torch.load(DATA / name / "cases.pt", weights_only=True)


def worst_difference(model, case):
    """Largest difference of logits on real tokens (of a decoder, on all)."""
    inputs = case["inputs"]
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**inputs).logits[:, :: STRIDES[length]]
    assert logits.shape == case["logits"].shape
    difference = (logits - case["logits"]).abs().amax(-1)
    if "decoder_input_ids" not in inputs:
        difference = difference[inputs["attention_mask"].bool()[:, :: STRIDES[length]]]
    return float(difference.max())


def settings(case):
    return tuple(sorted(case["kwargs"].items()))


@pytest.mark.parametrize("name", ["roberta", "bart"])
def test_every_case_of_the_published_models(name):
    differences = {}
    for kwargs in dict.fromkeys(settings(case) for case in cases(name)):
        model = from_pretrained(DATA / name / "lsg-norm", **dict(kwargs))
        for case in cases(name):
            if settings(case) == kwargs:
                differences[kwargs, case["inputs"]["input_ids"].shape[1]] = worst_difference(model, case)
    assert len(differences) == len(cases(name))
    assert max(differences.values()) < 1e-4, differences


@pytest.mark.parametrize("name", ["roberta", "bart"])
def test_our_conversion_makes_the_published_weights(name):
    model, tokenizer = convert(DATA / name / "base", max_sequence_length=1024, block_size=8, sparse_block_size=8)
    published, own = load_file(DATA / name / "lsg-norm" / "model.safetensors"), model.state_dict()
    assert not [key for key, tensor in published.items() if not torch.equal(own[key], tensor)]
    assert tokenizer.model_max_length == 1024
    longest = next(case for case in cases(name) if case["inputs"]["input_ids"].shape[1] == 700)
    assert worst_difference(model, longest) < 1e-4


def test_published_padding_of_bos_pooling_can_be_switched_off():
    case = next(case for case in cases("roberta") if case["kwargs"]["sparsity_type"] == "bos_pooling")
    case = next(
        c for c in cases("roberta") if c["kwargs"] == case["kwargs"] and c["inputs"]["input_ids"].shape[1] == 45
    )
    model = from_pretrained(DATA / "roberta/lsg-norm", **case["kwargs"], bos_pooling_sees_padding=False)
    assert worst_difference(model, case) > 1e-2  # the published overflow matters
    ids, mask = case["inputs"]["input_ids"], case["inputs"]["attention_mask"]
    real = int(mask[1].sum())
    with torch.no_grad():
        alone = model(ids[1:, :real], mask[1:, :real]).logits
        padded = model(ids, mask).logits[1:, :real]
    torch.testing.assert_close(alone, padded, atol=2e-5, rtol=1e-4)


def test_a_published_checkpoint_loads_with_another_head_and_dtype():
    path = DATA / "roberta" / "lsg-norm"
    model = from_pretrained(path, architecture="RobertaForSequenceClassification", num_labels=5, dtype=torch.bfloat16)
    assert type(model).__name__ == "LSGRobertaForSequenceClassification"
    assert model.classifier.out_proj.weight.shape[0] == 5
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert torch.isfinite(model(torch.arange(5, 65)[None]).logits).all()


def test_a_published_checkpoint_can_be_lengthened(tmp_path):
    for source in ("lsg-norm", "base"):  # the reference keeps the tokenizer with the base model only
        for file in (DATA / "roberta" / source).iterdir():
            if source == "lsg-norm" or "token" in file.name:
                shutil.copy(file, tmp_path / file.name)
    model, tokenizer = convert(tmp_path, tmp_path / "longer", 2000, resize_lsg=True)
    longest = next(case for case in cases("roberta") if case["inputs"]["input_ids"].shape[1] == 700)
    assert worst_difference(model, longest) < 1e-4
    assert tokenizer.model_max_length == 2000
    assert torch.isfinite(model(torch.arange(2000)[None] % 90 + 5).logits).all()
