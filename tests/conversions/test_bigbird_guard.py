"""A sparse BigBird stays sparse after a short batch, which transformers does not promise."""

import copy

import pytest
import torch
from tiny_sources import hidden, make_source, make_tokenizer
from transformers import BigBirdModel

from sparsefinder.conversions import convert_roberta_to_bigbird, runs_sparse, stay_sparse
from sparsefinder.errors import UserError


def sparse_model() -> BigBirdModel:
    model, _ = convert_roberta_to_bigbird(make_source(), make_tokenizer(), 60, block_size=2, num_random_blocks=1)
    return model


def unguarded(model: BigBirdModel) -> BigBirdModel:
    again = BigBirdModel(model.config).eval()
    again.load_state_dict(model.state_dict())
    return again


SHORT, LONG = torch.arange(5, 15)[None], torch.arange(5, 45)[None]


def test_transformers_still_has_the_trap() -> None:
    model = unguarded(sparse_model())
    first = hidden(model, LONG, torch.ones_like(LONG))
    hidden(model, SHORT, torch.ones_like(SHORT))
    assert model.attention_type == "original_full"
    assert not torch.allclose(first, hidden(model, LONG, torch.ones_like(LONG)), atol=1e-3)


@pytest.mark.parametrize("converted", [True, False])
def test_history_changes_nothing(converted: bool) -> None:
    model = sparse_model()
    model = model if converted else unguarded(model)
    guard = stay_sparse(model)
    assert runs_sparse(model, 15)
    assert not runs_sparse(model, 14)
    parameters = dict(model.named_parameters())
    first = hidden(model, LONG, torch.ones_like(LONG))
    random = torch.get_rng_state()
    short = hidden(model, SHORT, torch.ones_like(SHORT))
    assert torch.equal(random, torch.get_rng_state())
    assert model.attention_type == model.encoder.attention_type == "block_sparse"
    assert torch.equal(first, hidden(model, LONG, torch.ones_like(LONG)))
    assert torch.equal(short, hidden(model, SHORT, torch.ones_like(SHORT)))
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    guard.remove()


def test_for_a_while_only() -> None:
    model = unguarded(sparse_model())
    with stay_sparse(model):
        hidden(model, SHORT, torch.ones_like(SHORT))
        assert model.attention_type == "block_sparse"
    hidden(model, SHORT, torch.ones_like(SHORT))
    assert model.attention_type == "original_full"


def test_a_copy_guards_itself() -> None:
    model = copy.deepcopy(sparse_model())
    hidden(model, SHORT, torch.ones_like(SHORT))
    assert model.attention_type == "block_sparse"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_short_batches_train(checkpointing: bool) -> None:
    model = sparse_model().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for ids in (SHORT, LONG, SHORT, LONG):
        model.zero_grad()
        model(ids).last_hidden_state.square().sum().backward()
        found = model.encoder.layer[0].attention.self.query.weight.grad
        assert found.isfinite().all()
        assert found.abs().sum() > 0
    assert model.attention_type == "block_sparse"


def test_an_error_in_a_short_batch_leaves_the_model_sparse() -> None:
    model = sparse_model()
    with pytest.raises(IndexError):
        model(torch.full((1, 5), 1000))
    assert model.attention_type == "block_sparse"


def test_only_for_bigbird() -> None:
    with pytest.raises(UserError, match="a RobertaModel is no BigBird"):
        stay_sparse(make_source())
