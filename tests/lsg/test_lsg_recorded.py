"""Exported and traced LSG models: the same numbers for every padding, or a refusal."""

import warnings

import pytest
import torch
from lsg_tiny import NAMES, text
from packaging.version import Version
from test_lsg_models import lsg_model

from sparsefinder.errors import UserError
from sparsefinder.executors.local_sparse_global.settings import SPARSITY_TYPES
from sparsefinder.lsg.families import FAMILIES

OLD = Version(torch.__version__) < Version("2.13")


def example(name, batch=2, tokens=37):
    ids = text(tokens, batch)
    more = {"decoder_input_ids": ids[:, :5]} if FAMILIES[name].encoder_decoder else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def exported(model, inputs, **more):
    return torch.export.export(model, (), inputs, strict=False, **more).module()


def traced(model, inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False, check_trace=False)


def assert_same(model, other, inputs):
    """Equal outputs for no padding, on either side, and so much that what is left is dense."""
    ids = inputs["input_ids"]
    for begin, end in ((0, 37), (0, 22), (15, 37), (0, 6)):
        mask = torch.ones_like(ids)
        mask[-1, :begin], mask[-1, end:] = 0, 0
        if end == 6:
            mask[:, 6:] = 0
        given = {**inputs, "attention_mask": mask}
        with torch.no_grad():
            expected, found = model(**given)["last_hidden_state"], other(**given)["last_hidden_state"]
        if "decoder_input_ids" not in inputs:
            expected, found = expected[mask.bool()], found[mask.bool()]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "sparsity_type"),
    [
        *((name, "norm") for name in NAMES),
        *((name, kind) for kind in SPARSITY_TYPES[1:] for name in ("distilbert", "bart")),
    ],
)
def test_recorded_models_give_the_same_numbers_for_every_padding(name, sparsity_type):
    model = lsg_model(name, sparsity_type=sparsity_type, num_global_tokens=2, use_cache=False)
    assert_same(model, traced(model, example(name)), example(name))
    if (name, sparsity_type) in (("distilbert", "lsh"), ("bart", "norm"), ("roberta", "norm")):  # the slower one
        assert_same(model, exported(model, example(name)), example(name))


def test_a_recorded_model_takes_other_batches():
    model = lsg_model("roberta")
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    shapes = {"input_ids": batch, "attention_mask": batch}
    for other in (exported(model, example("roberta"), dynamic_shapes=shapes), traced(model, example("roberta"))):
        assert_same(model, other, example("roberta", batch=5))


def test_a_recorded_model_refuses_other_lengths():
    model = lsg_model("roberta")
    with pytest.raises(Exception, match="traced with 7 tokens; pad or cut the input of 37 to them"):
        traced(model, example("roberta", tokens=7))(**example("roberta"))
    length = {1: torch.export.Dim("length", min=20, max=64)}
    with pytest.raises(UserError, match="an LSG model is exported for one length"):
        exported(model, example("roberta"), dynamic_shapes={"input_ids": length, "attention_mask": length})


@pytest.mark.skipif(
    OLD, reason="torch.compile of torch 2.6 does not know a dataclass; later ones before 2.13 were not tried"
)
def test_compiled_models_give_the_same_numbers():
    model = lsg_model("distilbert", sparsity_type="lsh")
    assert_same(model, torch.compile(model, backend="eager", fullgraph=True), example("distilbert"))
