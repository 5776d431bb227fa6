"""Models of every family: against their plain sources, under padding, in training, in half precision."""

import copy
import json
import pickle

import pytest
import torch
from lsg_tiny import NAMES, VOCABULARY, heads, plain_config, plain_model, text

from sparsefinder.errors import UserError
from sparsefinder.lsg import config_class, from_pretrained, model_class, train_only_globals_and_head
from sparsefinder.lsg.embedding_tables import global_table
from sparsefinder.lsg.equivalence import output_states, without_globals
from sparsefinder.lsg.families import FAMILIES, architecture_of, family_of, plain_class

SMALL = {"block_size": 4, "sparse_block_size": 4, "sparsity_factor": 2}
EVERY_HEAD = [pair for name in NAMES for pair in heads(name)]


def lsg_model(name, architecture=None, plain=None, **settings):
    """An LSG model, with the weights of `plain` where given."""
    family = FAMILIES[name]
    raw = plain_config(name).to_dict()
    raw.pop("model_type")
    torch.manual_seed(1)
    model = model_class(f"LSG{architecture or family.base}")(config_class(family)(**{**raw, **SMALL, **settings}))
    if plain is not None:
        missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
        assert not unexpected
        assert all("global_embeddings" in key for key in missing)
    return model.eval()


def inputs_for(model, architecture, ids, mask=None):
    """Arguments of a forward pass with labels, for any head."""
    mask = torch.ones_like(ids) if mask is None else mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    batch = len(ids)
    if "MultipleChoice" in architecture:
        inputs = {key: value[:, None].repeat(1, 2, 1) for key, value in inputs.items()}
        inputs["labels"] = torch.zeros(batch, dtype=torch.long)
    elif "SequenceClassification" in architecture or "NextSentence" in architecture:
        inputs["labels"] = torch.zeros(batch, dtype=torch.long)
        if model.config.is_encoder_decoder:
            inputs["input_ids"] = torch.cat([ids[:, :-1], torch.full((batch, 1), 2)], dim=1)
    elif "QuestionAnswering" in architecture:
        inputs |= {
            "start_positions": torch.zeros(batch, dtype=torch.long),
            "end_positions": torch.ones(batch, dtype=torch.long),
        }
    elif architecture in ("BertForPreTraining", "AlbertForPreTraining"):
        second = "next_sentence_label" if architecture.startswith("Bert") else "sentence_order_label"
        inputs |= {"labels": ids, second: torch.zeros(batch, dtype=torch.long)}
    elif architecture == "ElectraForPreTraining":
        inputs["labels"] = (ids % 2).long()
    elif "For" in architecture or "LMHead" in architecture:
        inputs["labels"] = ids % 2 if "TokenClassification" in architecture else ids
    return inputs


@pytest.mark.parametrize("name", NAMES)
def test_a_global_token_is_one_more_token_of_the_plain_model(name):
    """On a short input, a global token that repeats a token is what the plain model makes of the longer text."""
    family, plain = FAMILIES[name], plain_model(name)
    model = lsg_model(name, plain=plain, pool_with_global=False, pass_global_tokens_to_decoder=False)
    ids, base = text(7, 2), plain.base_model
    with torch.no_grad():
        if family.encoder_decoder:
            table = base.encoder.embed_positions
            reserved = family.reserved(plain.config)
            wanted = base.encoder.embed_tokens(ids) * getattr(base.encoder, "embed_scale", 1.0)
            wanted = wanted + table.weight[reserved : reserved + 7]
            front = torch.randn(32)
            wanted = torch.cat([front.expand(2, 1, -1), wanted], dim=1)
            # transformers adds the positions 0 … 7 to what it is given
            expected = base.encoder(inputs_embeds=wanted - table.weight[reserved : reserved + 8]).last_hidden_state
        else:
            embeddings = base.embeddings
            first = family.reserved(plain.config)
            front = embeddings.word_embeddings.weight[9] + embeddings.position_embeddings.weight[first + 5]
            if hasattr(embeddings, "token_type_embeddings"):
                front = front + embeddings.token_type_embeddings.weight[0]
            positions = torch.cat([torch.tensor([5]), torch.arange(7)]) + first
            expected = base(
                input_ids=torch.cat([torch.full((2, 1), 9), ids], dim=1), position_ids=positions[None].expand(2, -1)
            ).last_hidden_state
        global_table(model, family).weight[0] = front
        found = output_states(model, ids, torch.ones_like(ids))
    torch.testing.assert_close(found, expected[:, 1:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_short_inputs_without_globals_give_the_source(name):
    plain = plain_model(name)
    model = lsg_model(name, plain=plain)
    ids, mask = text(8, 2), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    with torch.no_grad(), without_globals(model):
        found = output_states(model, ids, mask)
        expected = output_states(plain, ids, mask)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        assert (output_states(model, ids, mask)[:, -8:] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("sparsity_type", ["norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none"])
@pytest.mark.parametrize("name", ["bert", "distilbert", "pegasus"])
def test_padding_order_and_history_change_nothing(name, sparsity_type):
    settings = {"num_global_tokens": 3, "bos_pooling_sees_padding": False}
    model = lsg_model(name, sparsity_type=sparsity_type, **settings)
    ids = text(37, 2)
    mask = torch.ones_like(ids)
    mask[1, 22:] = 0
    with torch.no_grad():
        both = output_states(model, ids, mask)
        swapped = output_states(model, ids.flip(0), mask.flip(0)).flip(0)
        alone = output_states(model, ids[1:, :22], mask[1:, :22])
    front = both.shape[1] - 37
    torch.testing.assert_close(both, swapped, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(both[1:, : front + 22], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "architecture"), EVERY_HEAD)
def test_every_head_trains_with_finite_gradients(name, architecture):
    decodes = architecture.endswith(("ForCausalLM", "LMHeadModel"))
    settings = {"is_decoder": True} if decodes and not FAMILIES[name].encoder_decoder else {}
    model = lsg_model(name, architecture, num_global_tokens=2, num_labels=2, **settings).train()
    ids = text(21, 2)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    inputs = inputs_for(model, architecture, ids, mask)
    if architecture == "PegasusModel":
        inputs["decoder_input_ids"] = ids[:, :5]
    output = model(**inputs)
    loss = output.loss if "loss" in output else output[0].square().mean()
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values() if gradient is not None)
    table = global_table(model, FAMILIES[name])
    if table is None:
        return
    assert (table.weight.grad[:2].abs().sum(-1) > 0).all()
    assert (table.weight.grad[2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    model = lsg_model(name)
    half = copy.deepcopy(model).to(dtype)
    ids = text(21, 2)
    with torch.no_grad():
        expected = output_states(half.float(), ids, torch.ones_like(ids))
        found = output_states(copy.deepcopy(half).to(dtype), ids, torch.ones_like(ids))
    assert found.dtype == dtype
    error = (found.float() - expected).abs().max() / expected.abs().max()
    assert error < 30 * torch.finfo(dtype).eps, error


@pytest.mark.parametrize("name", [name for name in NAMES if name != "albert"])  # transformers has none for ALBERT
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = lsg_model(name, FAMILIES[name].default, dropout=0.0, attention_dropout=0.0, hidden_dropout_prob=0.0,
                          attention_probs_dropout_prob=0.0, activation_dropout=0.0).train()  # fmt: skip
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs_for(model, FAMILIES[name].default, text(21, 2))).loss.backward()
        gradients.append(global_table(model, FAMILIES[name]).weight.grad[:1])
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["bart", "mbart", "pegasus"])
def test_generation_agrees_with_the_forward_pass(name):
    for passes in (True, False):
        settings = {"pass_global_tokens_to_decoder": passes, "num_global_tokens": 3, "mask_first_token": True}
        model = lsg_model(name, FAMILIES[name].default, **settings)
        ids, mask = text(21, 2), torch.ones(2, 21, dtype=torch.long)
        mask[1, 15:] = 0
        kept = mask.clone()
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=5,
            do_sample=False,
            num_beams=1,
            forced_eos_token_id=None,
            eos_token_id=None,
        )
        assert torch.equal(mask, kept)  # the published encoder writes into the caller's mask
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, decoder_input_ids=out[:, :-1]).logits
        assert torch.equal(logits.argmax(-1), out[:, 1:])
        beams = model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2, do_sample=False)
        assert len(beams) == 2


@pytest.mark.parametrize(("name", "architecture"), [("roberta", "RobertaForCausalLM"), ("bert", "BertLMHeadModel")])
def test_a_decoder_is_causal_and_generates(name, architecture):
    model = lsg_model(name, architecture, is_decoder=True, pool_with_global=False)
    ids = text(30, 2)
    changed = torch.cat([ids[:, :20], (ids[:, 20:] + 1) % VOCABULARY], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[:, :20], model(changed).logits[:, :20], atol=1e-5, rtol=1e-4)
        out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        assert torch.equal(model(out[:, :-1]).logits[:, -4:].argmax(-1), out[:, -4:])


@pytest.mark.parametrize("name", ["roberta", "bart"])
def test_first_token_is_pooled_from_the_global_one(name):
    settings = {"num_global_tokens": 2, "pass_global_tokens_to_decoder": False}
    model = lsg_model(name, pool_with_global=True, **settings)
    apart = lsg_model(name, plain=None, pool_with_global=False, **settings)
    apart.load_state_dict(model.state_dict())
    ids = text(21)
    with torch.no_grad():
        pooled, own = (output_states(m, ids, torch.ones_like(ids)) for m in (model, apart))
        torch.testing.assert_close(pooled[:, 1:], own[:, 1:])
        assert (pooled[:, 0] - own[:, 0]).abs().max() > 1e-3
        if name == "bart":
            model.config.pass_global_tokens_to_decoder = True
            passed = output_states(model, ids, torch.ones_like(ids))
            assert passed.shape[1] == 23
            torch.testing.assert_close(passed[:, 2:], own)
            torch.testing.assert_close(passed[:, 0], pooled[:, 0])


@pytest.mark.parametrize("name", ["bert", "bart"])
def test_masked_first_token_is_read_by_nobody(name):
    model = lsg_model(name, mask_first_token=True)
    ids = text(21, 2)
    extra = {"decoder_input_ids": ids[:, :4]} if name == "bart" else {}
    other = ids.clone()
    other[:, 0] = (ids[:, 0] + 7) % VOCABULARY
    with torch.no_grad():
        expected = model(ids, **extra).last_hidden_state
        torch.testing.assert_close(model(other, **extra).last_hidden_state, expected)
        torch.testing.assert_close(model(ids, torch.ones_like(ids), **extra).last_hidden_state, expected)


def test_copies_and_tuples():
    model = lsg_model("roberta", "RobertaForMaskedLM")
    ids = text(21)
    with torch.no_grad():
        expected = model(ids).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(ids).logits, expected)
        assert torch.equal(model(ids, return_dict=False)[0], expected)
        states = model(ids, output_hidden_states=True).hidden_states
        assert [state.shape[1] for state in states] == [21, 21, 21]
        encoded = lsg_model("bart")(ids, decoder_input_ids=ids[:, :3], return_dict=False, output_hidden_states=True)
        assert isinstance(encoded, tuple)
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected)


def test_entmax_is_another_normalizer():
    model = lsg_model("roberta", "RobertaForMaskedLM")
    sparse = lsg_model("roberta", "RobertaForMaskedLM", normalizer_alpha=1.5)
    sparse.load_state_dict(model.state_dict())
    ids = text(21)
    assert (model(ids).logits - sparse(ids).logits).abs().max() > 1e-3
    sparse(ids, labels=ids).loss.backward()
    assert torch.isfinite(global_table(sparse, FAMILIES["roberta"]).weight.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_published_checkpoints_load_by_the_class_they_name(name, tmp_path):
    """Weights and configuration as the published converter saves them: other model type, its own auto map."""
    family = FAMILIES[name]
    model = lsg_model(name, family.default, num_global_tokens=2)
    model.save_pretrained(tmp_path)
    raw = model.config.to_dict()
    stem = f"modeling_lsg_{name}"
    raw |= {
        "model_type": name, "architectures": [f"LSG{family.default}"], "base_model_prefix": "lsg",
        "auto_map": {"AutoConfig": f"{stem}.{family.config_name}", "AutoModel": f"{stem}.LSG{family.base}"},
        "torch_dtype": "float32", "transformers_version": "4.36.2", "position_embedding_type": "absolute",
    }  # fmt: skip
    for ours in ("lsh_seed", "normalizer_alpha", "bos_pooling_sees_padding", "dtype"):
        raw.pop(ours)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    again = from_pretrained(tmp_path)
    assert type(again) is type(model)
    ids = text(30, 2)
    extra = {"decoder_input_ids": ids[:, :4]} if family.encoder_decoder else {}
    with torch.no_grad():
        assert torch.equal(again(ids, **extra)[0], model(ids, **extra)[0])
    other = from_pretrained(
        tmp_path,
        num_global_tokens=16,
        block_size=8,
        sparse_block_size=8,
        sparsity_factor=4,
        sparsity_type="none",
        mask_first_token=True,
    )
    assert (other.config.num_global_tokens, other.config.sparsity_type) == (16, "none")
    assert torch.isfinite(other(ids, **extra)[0]).all()


def test_training_globals_and_head_only():
    model = lsg_model("roberta", "RobertaForSequenceClassification", num_labels=2)
    names = train_only_globals_and_head(model)
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert "roberta.embeddings.global_embeddings.weight" in names
    assert all(name.startswith("classifier") or "global_embeddings" in name for name in names)
    masked = train_only_globals_and_head(lsg_model("roberta", "RobertaForMaskedLM"))
    assert "lm_head.dense.weight" in masked
    assert "roberta.embeddings.word_embeddings.weight" not in masked


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity_type": "nrom"}, "unknown sparsity_type 'nrom'; choose one of norm, pooling, lsh"),
        ({"block_size": 6, "sparsity_factor": 4}, "block_size 6 is not divisible by sparsity_factor 4"),
        ({"num_global_tokens": 0}, "1 to 512"),
        ({"num_global_tokens": 513}, "1 to 512"),
    ],
)
def test_wrong_settings_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        lsg_model("bert", **settings)


def test_wrong_inputs_are_refused():
    model = lsg_model("bert")
    with pytest.raises(UserError, match="input of 65 tokens, and the model's longest is 64"):
        model(text(65))
    with pytest.raises(UserError, match="attention_mask"):
        model(text(9), attention_mask=torch.ones(1, 9, 9))
    with pytest.raises(UserError, match="adaptive=True"):
        lsg_model("bert", adaptive=False)(text(13))
    assert lsg_model("bert", adaptive=False)(text(12)).last_hidden_state.shape[1] == 12


def test_unknown_families_and_architectures_name_the_valid_ones():
    with pytest.raises(UserError, match="albert, bart, barthez, bert, camembert, distilbert, electra, mbart, pegasus"):
        family_of("t5")
    assert family_of("barthez") is FAMILIES["mbart"]
    with pytest.raises(UserError, match="RobertaForMaskedLM"):
        architecture_of(FAMILIES["roberta"], "BertForMaskedLM")
    assert plain_class("BertModel").__name__ == "BertModel"


def test_settings_have_the_published_names_and_another_spelling():
    config = config_class(FAMILIES["roberta"])(lsg_num_pre_rounds=3, sparsity_type=None)
    assert config.lsh_num_pre_rounds == 3
    assert config.lsg_attention().sparsity_type == "none"
    assert config.lsg_num_pre_rounds == 3
    assert "lsg_num_pre_rounds" not in config.to_dict()
