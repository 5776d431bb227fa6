"""What users of transformers expect of any model: of hidden states, padding, settings, checkpointing and offloading."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload
from lsg_tiny import NAMES, plain_model, text
from test_lsg_models import inputs_for, lsg_model

from sparsefinder.errors import UserError
from sparsefinder.lsg import from_pretrained
from sparsefinder.lsg.equivalence import output_states
from sparsefinder.lsg.families import FAMILIES


def run(model, ids, mask=None, **more):
    """The base model's output, of the encoder where there is one."""
    part = model.encoder if model.config.is_encoder_decoder else model
    with torch.no_grad():
        return part(input_ids=ids, attention_mask=mask, **more)


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("sparsity_type", ["norm", "bos_pooling"])  # the second adds positions up to whole blocks
@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_are_those_of_the_text(name, sparsity_type, passed):
    if not passed and not FAMILIES[name].encoder_decoder:
        return
    settings = {"num_global_tokens": 3, "pass_global_tokens_to_decoder": passed}
    model = lsg_model(name, sparsity_type=sparsity_type, **settings)
    seen = []
    layers = [module for module in model.modules() if type(module).__name__.endswith(("Layer", "TransformerBlock"))]
    owner = model.encoder if model.config.is_encoder_decoder else getattr(model, FAMILIES[name].stack)
    layers = [module for module in owner.modules() if module in layers]
    handles = [layer.register_forward_hook(lambda module, args, out: seen.append((args[0], out))) for layer in layers]
    output = run(model, text(21, 2), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert [state.shape for state in output.hidden_states] == [(2, 21, 32)] * 3
    torch.testing.assert_close(output.hidden_states[0], seen[0][0][:, 3:24], atol=0.0, rtol=0.0)
    first = seen[0][1]
    torch.testing.assert_close(output.hidden_states[1], first[:, 3:24], atol=0.0, rtol=0.0)
    torch.testing.assert_close(output.hidden_states[-1], output.last_hidden_state[:, -21:], atol=0.0, rtol=0.0)
    assert torch.stack(output.hidden_states[-2:]).mean(0).shape == (2, 21, 32)


def test_some_hidden_states_can_be_chosen():
    """Those that the plain model gives: all of them in older releases of transformers, the chosen ones in newer."""
    lengths = []
    for model in (plain_model("roberta"), lsg_model("roberta")):
        states = run(model, text(21), output_hidden_states=[1]).hidden_states
        lengths.append([None if state is None else state.shape[1] for state in states])
    assert lengths[0] == lengths[1]
    assert lengths[1][1] == 21


@pytest.mark.parametrize(("sparsity_type", "pool_with_global"), [("norm", True), ("lsh", False), ("bos_pooling", True)])
@pytest.mark.parametrize("name", NAMES)
def test_padding_may_stand_on_the_left(name, pool_with_global, sparsity_type):
    """Real tokens get what they get alone, in every layer, and position 0 holds the first of them for heads that look there."""
    settings = {"num_global_tokens": 2, "pass_global_tokens_to_decoder": False}
    if sparsity_type != "bos_pooling":
        settings["bos_pooling_sees_padding"] = False
    model = lsg_model(name, pool_with_global=pool_with_global, sparsity_type=sparsity_type, **settings)
    ids = text(37, 2)
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :12] = 0
    right[1, 25:] = 0
    pad = model.config.pad_token_id
    on_left = torch.where(left.bool(), ids, pad)
    on_right = torch.stack([on_left[0], on_left[1].roll(-12)])
    found = run(model, on_left, left, output_hidden_states=True)
    expected = run(model, on_right, right, output_hidden_states=True)
    for state, wanted in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state[0], wanted[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state[1, 12:], wanted[1, :25], atol=1e-5, rtol=1e-4)
        assert torch.equal(state[1, 0], state[1, 12])
    if "pooler_output" in found:
        torch.testing.assert_close(found.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["roberta", "bert", "distilbert"])
def test_classifiers_read_the_first_token_of_left_padded_texts(name):
    model = lsg_model(name, f"{FAMILIES[name].stem}ForSequenceClassification", num_labels=3)
    ids, mask = text(20), torch.ones(1, 30, dtype=torch.long)
    mask[:, :10] = 0
    padded = torch.cat([torch.full((1, 10), model.config.pad_token_id), ids], dim=1)
    types = {"token_type_ids": torch.zeros_like(padded)} if name == "bert" else {}
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(model(padded, mask, **types).logits, expected, atol=1e-5, rtol=1e-4)
        embeds = model.get_input_embeddings()(padded)
        torch.testing.assert_close(
            model(inputs_embeds=embeds, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-4
        )


def test_a_decoder_reads_a_left_padded_text():
    model = lsg_model("bart")
    ids, mask = text(20), torch.ones(1, 30, dtype=torch.long)
    mask[:, :10] = 0
    padded = torch.cat([torch.ones(1, 10, dtype=torch.long), ids], dim=1)
    with torch.no_grad():
        expected = model(ids, decoder_input_ids=ids[:, :4]).last_hidden_state
        found = model(padded, mask, decoder_input_ids=ids[:, :4]).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bart", "mbart", "pegasus"])
def test_a_decoder_input_beyond_the_model_is_refused(name):
    model, ids = lsg_model(name), text(21)
    assert model(ids, decoder_input_ids=text(64)).last_hidden_state.shape[1] == 64
    for given in ({"decoder_input_ids": text(65)}, {"decoder_inputs_embeds": torch.zeros(1, 65, 32)}):
        with pytest.raises(UserError, match="decoder input of 65 tokens, and the decoder's longest is 64"):
            model(ids, **given)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_by_place_and_by_name_are_the_same(name):
    model, ids = lsg_model(name), text(21, 2)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    embeds = model.get_input_embeddings()(ids)
    decoded = ids[:, :4]
    by_place = {
        "distilbert": (None, mask, embeds),
        **dict.fromkeys(("bart", "mbart", "pegasus"), (None, mask, decoded, None, None, None, embeds)),
    }.get(name, (None, mask, None, None, embeds))
    more = {"decoder_input_ids": decoded} if FAMILIES[name].encoder_decoder else {}
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, attention_mask=mask, **more)
        assert torch.equal(model(*by_place)[0], expected.last_hidden_state)
        assert torch.equal(model(*by_place, return_dict=False)[0], expected.last_hidden_state)


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_attention_weights_are_refused(name):
    model, ids = lsg_model(name), text(21)
    more = {"decoder_input_ids": ids[:, :3]} if name == "bart" else {}
    with pytest.raises(UserError, match="output_attentions=True: LSG attention never makes the table of all pairs"):
        model(ids, output_attentions=True, **more)
    model.set_attn_implementation("eager")  # or transformers refuses the next line itself
    model.config.output_attentions = True
    with pytest.raises(UserError, match="output_attentions"):
        model(ids, **more)
    if name == "bart":
        model.config.output_attentions = False
        with torch.no_grad():
            first = model.encoder(ids)
            output = model(encoder_outputs=first, output_attentions=True, **more)
        assert [weights.shape for weights in output.cross_attentions] == [(1, 4, 3, 22)] * 2


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 8, "sparse_block_size": 8},
        {"sparsity_type": "lsh", "lsh_seed": 7},
        {"num_global_tokens": 5},
        {"normalizer_alpha": 1.5},
        {"mask_first_token": True},
        {"pool_with_global": False},
        {"sparsity_type": "bos_pooling", "sparsity_factor": 4},
    ],
)
@pytest.mark.parametrize("name", ["roberta", "albert", "pegasus"])
def test_a_setting_changed_on_a_model_is_that_setting(name, changes):
    model, ids = lsg_model(name), text(37)
    made_so = lsg_model(name, **changes)
    made_so.load_state_dict(model.state_dict())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        before, expected = output_states(model, ids, mask), output_states(made_so, ids, mask)
        for key, value in changes.items():
            setattr(model.config, key, value)
        assert torch.equal(output_states(model, ids, mask), expected)
        assert torch.equal(output_states(copied, ids, mask), before)  # its configuration is its own
        for key, value in changes.items():
            setattr(copied.config, key, value)
        assert torch.equal(output_states(copied, ids, mask), expected)


def test_a_wrong_setting_on_a_model_is_refused():
    model = lsg_model("roberta")
    model.config.sparsity_type = "nrom"
    with pytest.raises(UserError, match="unknown sparsity_type 'nrom'"):
        model(text(5))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "albert"])  # transformers has none for ALBERT
def test_checkpointing_named_in_the_configuration_is_done(name):
    still = dict.fromkeys(("dropout", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    gradients = []
    for settings in ({}, {"gradient_checkpointing": True}):
        torch.manual_seed(0)
        model = lsg_model(name, FAMILIES[name].default, **still, **settings).train()
        runs = []
        for module in model.modules():
            if hasattr(module, "lsg"):
                module.register_forward_hook(lambda *_, runs=runs: runs.append(0))
        model(**inputs_for(model, FAMILIES[name].default, text(21, 2))).loss.backward()
        assert len(runs) == (4 if settings else 2)  # each layer is run again on the way back
        assert not getattr(
            model.config, "gradient_checkpointing", False
        )  # as transformers: not a setting that is saved
        gradients.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, atol=1e-6, rtol=1e-4)


def test_checkpointing_can_be_asked_for_at_load(tmp_path, caplog):
    for name in ("roberta", "albert"):
        lsg_model(name).save_pretrained(tmp_path / name)
        model = from_pretrained(tmp_path / name, gradient_checkpointing=True)
        done = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert done == (name == "roberta")
        assert ("gradient_checkpointing has no effect" in caplog.text) == (name == "albert")


@pytest.mark.parametrize("name", NAMES)
def test_offloaded_weights_are_found(name):
    model, ids = lsg_model(name, sparsity_type="bos_pooling"), text(21, 2)
    more = {"decoder_input_ids": ids[:, :4]} if FAMILIES[name].encoder_decoder else {}
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, **more).last_hidden_state
        offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        assert torch.equal(offloaded(ids, attention_mask=mask, **more).last_hidden_state, expected)
