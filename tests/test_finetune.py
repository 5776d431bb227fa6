"""Training: what is read and masked follows from the seed and the step, a killed run ends the same, loss is counted right."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny_models import save_tiny, tiny_batch, tiny_model
from torch import nn

from sparsefinder import extract, finetune, pipeline
from sparsefinder.attention import Bucketed
from sparsefinder.corpora import Masking, TextFiles, TokenBlocks, token_blocks
from sparsefinder.errors import UserError
from sparsefinder.evaluation.arms import Arm, Reading
from sparsefinder.evaluation.variants import AttentionChoice
from sparsefinder.experiment.configuration import Configuration
from sparsefinder.experiment.instantiate import construct
from sparsefinder.finetune import FinetuneSettings, NewModel, Pretrained
from sparsefinder.models import (
    FAMILIES,
    get_normalizer,
    load_masked_lm,
    masked_lm,
    plugged,
    set_normalizer,
    statistical_init,
    trainer,
)
from sparsefinder.models.alpha_schedule import annealed
from sparsefinder.models.learned_heads import PerHeadSettings, get_heads, learned_heads
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.quantize import Quantize
from sparsefinder.patterns.window import Window
from sparsefinder.predictors.projections import LayerProjections, Linear, Projections
from sparsefinder.storage.store import Store

SENTENCE = "The model attends to the keys that its query needs, and to few others. "
TINY = NewModel(
    vocabulary_size=300, max_length=24, layers=2, heads=2, hidden_size=16, intermediate_size=24, dropout=0.1
)

PER_HEAD = PerHeadSettings(alpha=True, temperature=True, alpha_bounds=(1.48, 1.6), beta_bounds=(0.0, 0.03))


@pytest.fixture
def corpus(tmp_path):
    for name, count in (("train", 60), ("valid", 12)):
        text = "\n\n".join(SENTENCE * (1 + i % 3) + f"{name} {i}." for i in range(count))
        (tmp_path / name).write_text(text)
    return TextFiles(str(tmp_path / "train"), str(tmp_path / "valid"))


def settings_for(corpus, **changes):
    values = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "warmup": 2, "eval_steps": 2, "eval_blocks": 8}
    return FinetuneSettings(corpus=corpus, **{"model": TINY, **values, **changes})


def run(settings, folder):
    store = Store(folder)
    finetune.run(settings, store)
    return store


def weights(store):
    return load_masked_lm(store.run_dir / "model")[0].state_dict()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


# ---- the stage ----


def test_a_new_model_is_trained_saved_and_measured(corpus, tmp_path, caplog):
    caplog.set_level("INFO")
    store = run(settings_for(corpus), tmp_path / "run")
    model, tokenizer = load_masked_lm(tmp_path / "run" / "model")
    assert get_normalizer(model) == Normalizer(1.5)
    assert (len(tokenizer), tokenizer.model_max_length) == (300, 24)
    facts = store._facts["model"]
    assert {"validation_loss", "unigram_entropy", "gold_sparsity"} <= facts.keys()
    assert facts["validation_loss"] < math.log(300)
    assert 0 <= facts["gold_sparsity"] < 1
    assert "nats below; mean gold sparsity" in caplog.text
    assert "step 4 of 6: training loss" in caplog.text
    assert not (tmp_path / "run" / "scratch" / "finetune").exists()


def test_the_same_settings_give_the_same_model(corpus, tmp_path):
    first, second = (weights(run(settings_for(corpus), tmp_path / name)) for name in "ab")
    assert_same(first, second)
    other = weights(run(settings_for(corpus, seed=1), tmp_path / "c"))
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("kill_at", [3, 5])
@pytest.mark.parametrize(
    "changes", [{"accumulation": 2, "alpha_schedule": True}, {"per_head": PER_HEAD}], ids=["", "heads"]
)
def test_a_killed_run_ends_with_the_same_weights(corpus, tmp_path, monkeypatch, kill_at, changes):
    """Killed in the step after a checkpoint, and once more while the next checkpoint is half written."""
    expected = weights(run(settings_for(corpus, **changes), tmp_path / "whole"))

    class Killed(BaseException):
        pass

    loss = trainer.MaskedLMTrainer.compute_loss

    def dies(self, model, *arguments, **named):
        if self.state.global_step == kill_at and model.training:
            raise Killed
        return loss(self, model, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MaskedLMTrainer, "compute_loss", dies)
        with pytest.raises(Killed):
            run(settings_for(corpus, **changes), tmp_path / "killed")
    assert not (tmp_path / "killed" / "model").exists()
    (folder,) = (tmp_path / "killed" / "scratch" / "finetune").iterdir()
    half = folder / "checkpoint-99"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert trainer.last_checkpoint(folder).name == f"checkpoint-{kill_at - 1}"
    assert not half.exists()
    assert_same(weights(run(settings_for(corpus, **changes), tmp_path / "killed")), expected)
    whole, killed = tmp_path / "whole" / "model", tmp_path / "killed" / "model"
    assert {file.name for file in whole.iterdir()} == {file.name for file in killed.iterdir()}
    for file in whole.iterdir():  # the second start found its blocks in the cache, and tokenized nothing
        assert file.read_bytes() == (killed / file.name).read_bytes(), file.name
    saved = json.loads((whole / "tokenizer.json").read_text())
    assert saved["truncation"] is saved["padding"] is None


def test_each_head_learns_within_its_bounds_and_later_on(corpus, tmp_path):
    settings = settings_for(corpus, learning_rate=0.02, per_head=PER_HEAD)
    first = load_masked_lm(run(settings, tmp_path / "first").run_dir / "model")[0]
    learned = get_heads(first)
    for name, (low, high), begin in (("alpha", PER_HEAD.alpha_bounds, 1.5), ("beta", PER_HEAD.beta_bounds, 0.0)):
        values = getattr(learned, name)
        assert values.shape == (2, 2)
        assert bool(((values >= low - 1e-6) & (values <= high + 1e-6)).all()), name
        assert bool((values != begin).any()), name
    assert not [name for name, _ in first.named_parameters() if "entmax_heads" in name]
    again = settings_for(corpus, steps=0, per_head=PER_HEAD, model=Pretrained(str(tmp_path / "first" / "model")))
    kept = get_heads(load_masked_lm(run(again, tmp_path / "again").run_dir / "model")[0])
    assert all(torch.equal(getattr(kept, name), getattr(learned, name)) for name in ("alpha", "beta", "gamma"))
    one = dataclasses.replace(again, per_head=PerHeadSettings())  # one α for all again; the temperature is the model's
    model = load_masked_lm(run(one, tmp_path / "one").run_dir / "model")[0]
    assert get_normalizer(model) == Normalizer(1.5)
    assert torch.equal(get_heads(model).beta, learned.beta)


def test_weight_decay_leaves_the_heads_alone():
    model = tiny_model()
    set_normalizer(model, Normalizer(1.5))
    with learned_heads(model, PER_HEAD):
        own = trainer.MaskedLMTrainer.__new__(trainer.MaskedLMTrainer)
        names = own.get_decay_parameter_names(model)
    assert names
    assert not [name for name in names if "entmax_heads" in name]


def test_recorded_files_hold_a_temperature_and_no_alpha_of_a_head(corpus, tmp_path):
    """The recorded queries and keys of the first layer are those of the plain weights, and the formula between them."""
    temperature = PerHeadSettings(temperature=True, beta=0.5, gamma=0.5)

    def recorded(name: str, **changes):
        model = run(settings_for(corpus, **changes), tmp_path / name).run_dir / "model"
        store = Store(tmp_path / f"{name}_qk", given={"model": model})
        extract.run(extract.ExtractSettings(corpus, nsamples=3, nsamples_validation=1), store)
        return torch.load(store.run_dir / "qk_enc-attn.pt", weights_only=True)

    plain = recorded("plain", steps=0)
    files = recorded("hot", steps=1, learning_rate=1e-9, per_head=temperature)
    for q, expected, k, same in zip(files["q"], plain["q"], files["k"], plain["k"], strict=True):
        factor = 1.0 + 0.5 * math.log(1 + q.shape[2]) ** 0.5
        torch.testing.assert_close(q[0], factor * expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(k[0], same[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="attention_alpha in this model's configuration differs from head to head"):
        recorded("apart", steps=1, per_head=PerHeadSettings(alpha=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 2.0}, r"finetune.alpha=2.0 must lie within finetune.per_head.alpha_bounds=\[1.48, 1.6\]"),
        ({"alpha_schedule": True}, "finetune.alpha_schedule needs one for all"),
        ({"attention": Arm("window", Configuration("window", Window(3)))}, "finetune.attention needs one for all"),
    ],
)
def test_what_does_not_go_with_an_alpha_for_each_head(corpus, changes, message):
    with pytest.raises(UserError, match=message):
        settings_for(corpus, per_head=PER_HEAD, **changes)


def test_an_unknown_setting_of_the_heads_is_said():
    with pytest.raises(UserError, match=r"PerHeadSettings has no setting temprature; .*did you mean temperature"):
        construct(PerHeadSettings, {"temprature": True}, "finetune.per_head")


@pytest.mark.parametrize("devices", [1, 2])
def test_a_process_trains_on_one_device_however_many_there_are(corpus, tmp_path, monkeypatch, devices):
    expected = weights(run(settings_for(corpus), tmp_path / "one"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert_same(weights(run(settings_for(corpus), tmp_path / "many")), expected)


def test_checkpoints_of_other_settings_are_not_used(corpus, tmp_path):
    store = Store(tmp_path)
    first = finetune._checkpoints(settings_for(corpus), store)
    assert finetune._checkpoints(settings_for(corpus), store) == first
    second = finetune._checkpoints(settings_for(corpus, learning_rate=1e-4), store)
    assert second != first
    assert not first.exists()


def test_a_given_folder_is_known_by_its_content(corpus, tmp_path, caplog):
    """The same command after the folder changed: the stage runs again, and uses no checkpoint of the old weights."""
    caplog.set_level("INFO")
    given, store = tmp_path / "given", Store(tmp_path / "run")
    save_tiny(given)
    settings = settings_for(corpus, model=Pretrained(str(given)), steps=0)

    def once_more():
        caplog.clear()
        pipeline.run_stages([pipeline.STAGES["finetune"]], {"finetune": settings}, store, 0)
        return caplog.text

    once_more()
    assert "done and unchanged" in once_more()
    (given / "checkpoint-1").mkdir()
    (given / "checkpoint-1" / "model.safetensors").write_bytes(b"not read")
    assert "done and unchanged" in once_more()
    checkpoints = finetune._checkpoints(settings, store)
    save_tiny(given, other := tiny_model(seed=1))
    assert finetune._checkpoints(settings, store) != checkpoints
    assert "runs again, because pretrained model changed" in once_more()
    assert_same(weights(store), other.state_dict())
    assert Pretrained("roberta-base").inputs == {}
    with pytest.raises(UserError, match="is what this stage writes: choose another run_dir"):
        run(settings_for(corpus, model=Pretrained(str(store.run_dir / "model"))), store.run_dir)
    assert_same(weights(store), other.state_dict())


def test_no_steps_take_the_model_as_it_is(corpus, tmp_path):
    model = tiny_model()
    save_tiny(tmp_path / "given", model)
    settings = settings_for(corpus, model=Pretrained(str(tmp_path / "given")), steps=0, alpha=1.3)
    store = run(settings, tmp_path / "run")
    assert_same(weights(store), model.state_dict())
    assert get_normalizer(load_masked_lm(store.run_dir / "model")[0]) == Normalizer(1.3)


def test_text_of_unknown_words_is_refused_before_training(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "train", lambda *_: pytest.fail("trained"))
    save_tiny(tmp_path / "given")
    unknown = tmp_path / "unknown"
    unknown.write_text("京 " * 40)
    for split, texts in (("validation", (corpus.train, unknown)), ("train", (unknown, corpus.validation))):
        settings = settings_for(TextFiles(*map(str, texts)), model=Pretrained(str(tmp_path / "given")))
        with pytest.raises(UserError, match=f"the {split} part of the corpus .* hold only special tokens"):
            run(settings, tmp_path / f"run_{split}")
        assert not (tmp_path / f"run_{split}" / "model").exists()


def test_epochs_are_steps_over_all_blocks(corpus, tmp_path, caplog):
    counted = settings_for(corpus, steps=None, epochs=1.5, batch_size=4, accumulation=2)
    blocks = 21
    assert finetune.steps_over(counted, blocks) == 4  # 31.5 blocks in steps of 8
    assert finetune.steps_over(settings_for(corpus), blocks) == 6
    caplog.set_level("INFO")
    store = run(settings_for(corpus, steps=None, epochs=0.05), tmp_path / "run")
    steps = store._facts["model"]["steps"]
    assert steps > 0
    _, tokenizer = load_masked_lm(tmp_path / "run" / "model")
    assert steps == math.ceil(0.05 * len(token_blocks(corpus, tokenizer, "train", 24)) / 4)
    assert f"finetune: {steps} steps" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_made_and_trained(corpus, tmp_path, family):
    model = dataclasses.replace(TINY, family=family)
    store = run(settings_for(corpus, model=model, steps=1), tmp_path)
    made = load_masked_lm(store.run_dir / "model")[0]
    assert made.config.model_type == family
    assert {module.p for module in made.modules() if isinstance(module, nn.Dropout)} == {TINY.dropout}
    own = {"distilbert": "attention_dropout", "modernbert": "attention_dropout"}
    assert getattr(made.config, own.get(family, "attention_probs_dropout_prob")) == TINY.dropout
    inside = {module.out_features for module in made.base_model.modules() if isinstance(module, nn.Linear)}
    joined = {16, 3 * 16, 2 * 24}  # queries, keys and values are one matrix there; so are the gate and what passes it
    assert inside == (joined if family == "modernbert" else {16, 24})
    ids = {name: value for name, value in made.config.to_dict().items() if name.endswith("_token_id")}
    assert all(value is None or 0 <= value < TINY.vocabulary_size for value in ids.values()), ids


def test_training_learns(corpus, tmp_path):
    before = run(settings_for(corpus, steps=0), tmp_path / "a")._facts["model"]
    after = run(settings_for(corpus, steps=60, eval_steps=60), tmp_path / "b")._facts["model"]
    assert after["validation_loss"] < before["validation_loss"] - 1.0


def test_settings_check_themselves(corpus):
    for changes, message in (
        ({"steps": -1}, "finetune.steps must not be negative"),
        ({"epochs": 2}, "finetune.steps=6 and finetune.epochs=2: one of them"),
        ({"steps": None}, "one of them says how long"),
        ({"steps": None, "epochs": 0}, "finetune.epochs must be positive"),
        ({"steps": None, "epochs": math.nan}, "finetune.epochs must be positive"),
        ({"batch_size": 0}, "finetune.batch_size must be 1 or more"),
        ({"learning_rate": 0.0}, "finetune.learning_rate must be positive"),
        ({"alpha": 0.5}, "finetune.alpha must lie between 1"),
        ({"schedule": "steps"}, "choose one of linear, cosine"),
        ({"mask_fraction": 1.0}, "finetune.mask_fraction"),
    ):
        with pytest.raises(UserError, match=message):
            settings_for(corpus, **changes)
    for changes, message in (
        ({"family": "bloom"}, "model.family=bloom is unknown; choose one of roberta"),
        ({"layers": 0}, "model.layers must be 1 or more"),
        ({"start": "cold"}, "model.start=cold is unknown; choose one of random, statistics"),
        ({"hidden_size": 15}, "is not a multiple of model.heads"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(TINY, **changes)


def test_mixed_precision_works_without_a_gpu(corpus, tmp_path):
    store = run(settings_for(corpus, bf16=True), tmp_path / "run")
    assert store._facts["model"]["validation_loss"] < math.log(300)


def test_the_last_steps_read_longer_blocks(corpus, tmp_path, monkeypatch):
    read = []
    loss = trainer.MaskedLMTrainer.compute_loss

    def look(self, model, inputs, *arguments, **named):
        if model.training:
            read.append(inputs["input_ids"].shape[1])
        return loss(self, model, inputs, *arguments, **named)

    monkeypatch.setattr(trainer.MaskedLMTrainer, "compute_loss", look)
    changes = {"length": 12, "longer_length": 24, "longer_steps": 2, "accumulation": 2}
    run(settings_for(corpus, **changes), tmp_path / "run")
    assert len(read) == 12
    assert max(read[:8]) == 12
    assert min(read[8:]) > 12
    whole = trainer.Examples(*(examples := _blocks_and_masking()), 8, 4, 3)
    last = trainer.Examples(*examples, 4, 4, 3, first=4)
    assert whole.order[:4] == last.order
    assert not torch.equal(whole[0][1], last[0][1])  # the same block, masked anew
    for wrong in ({"longer_steps": 6}, {"longer_steps": 2, "steps": None, "epochs": 1.0}):
        with pytest.raises(UserError, match=r"finetune\.longer_steps=\d are the last of finetune\.steps="):
            settings_for(corpus, **wrong)
    with pytest.raises(UserError, match=r"finetune\.longer_length=100, but the model takes at most 24 tokens"):
        run(settings_for(corpus, longer_steps=1, longer_length=100), tmp_path / "long")


def bucketed(pattern):
    return Arm(type(pattern).__name__, AttentionChoice("bucketed", Bucketed), Configuration("x", pattern))


def test_it_may_be_trained_under_another_attention(corpus, tmp_path):
    steady = {"model": dataclasses.replace(TINY, dropout=0.0), "steps": 4, "warmup": 0}
    arms = {"own": None, "every pair": bucketed(Window(63)), "itself": bucketed(Window(1))}
    values = {
        name: weights(run(settings_for(corpus, attention=arm, **steady), tmp_path / name))[
            "roberta.encoder.layer.0.attention.self.value.weight"
        ]
        for name, arm in arms.items()
    }
    torch.testing.assert_close(values["every pair"], values["own"], rtol=0, atol=1e-4)
    assert (values["itself"] - values["own"]).abs().max() > 1e-3


def test_what_its_pattern_learned_comes_from_another_run(corpus, tmp_path):
    learned = Store(tmp_path / "learned")
    with learned.writing("projections") as path:
        Projections([LayerProjections(Linear(2, 8, 4), Linear(2, 8, 4)) for _ in range(2)]).save(path)
    learned.finish("projections", "project", {}, {}, 0)
    arm = bucketed(Quantize(2))
    settings = settings_for(corpus, attention=arm, learned=str(learned.run_dir), steps=1)
    assert settings.inputs["learned_projections"] == learned.content("projections")
    run(settings, tmp_path / "run")
    for said, wrong in {
        r"finetune.attention=Quantize works with projections: finetune.learned=RUN_DIR": {"attention": arm},
        r"finetune.learned=nowhere is no folder": {"attention": arm, "learned": "nowhere"},
        r"finetune.learned is for the pattern of finetune.attention": {"learned": str(learned.run_dir)},
        r"finetune.alpha_schedule anneals": {"attention": bucketed(Window(3)), "alpha_schedule": True},
        r"finetune.attention takes a pattern or an attention": {"attention": Arm("a", reading=Reading("chunks", 8))},
    }.items():
        with pytest.raises(UserError, match=said):
            settings_for(corpus, **wrong)


def test_blocks_longer_than_the_model_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"finetune\.length=100, but the model takes at most 24 tokens"):
        run(settings_for(corpus, length=100), tmp_path)


# ---- what is read, and when ----


def _blocks_and_masking():
    lengths = torch.randint(8, 30, (23,), generator=torch.Generator().manual_seed(0))
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    blocks = TokenBlocks(torch.randint(5, 90, (int(starts[-1]),), dtype=torch.int32), starts)
    return blocks, Masking(4, 90, (0, 1, 2, 3, 4))


def test_examples_follow_from_seed_and_index():
    blocks, masking = _blocks_and_masking()
    lengths = blocks.lengths
    some, more = (trainer.Examples(blocks, masking, count, batch_size=4, seed=3) for count in (40, 100))
    assert some.order == more.order[:40]
    assert len(some) == 40
    first_pass = more.order[:24]  # 23 blocks, and one again to fill the last batch
    assert set(first_pass) == set(range(23))
    assert more.order[24:48] != first_pass
    spread = [lengths[first_pass[start : start + 4]] for start in range(0, 24, 4)]
    assert sum(int(part.max() - part.min()) for part in spread) < 40  # at random about 80
    for one, two in zip(some[7], more[7], strict=True):
        assert torch.equal(one, two)


def test_alpha_is_annealed_over_the_first_half():
    values = [annealed(1.5, step, 100) for step in range(101)]
    assert values[0] == 1.01
    assert values == sorted(values)
    assert values[50] == values[100] == 1.5
    assert max(values[:45]) < 1.5
    assert len(set(values)) <= 52
    assert annealed(1.0, 3, 100) == 1.0


# ---- what is measured ----


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_on_chosen_tokens_equals_the_whole_loss(family):
    """The plain reference: transformers' own loss over all positions."""
    model, batch = tiny_model(family), tiny_batch()
    set_normalizer(model, Normalizer(1.5))
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][0, 2], batch["labels"][0, 5], batch["labels"][1, 3] = 7, 8, 9
    expected = model(**batch).loss
    logits, labels = masked_lm.masked_logits(model, batch)
    assert logits.shape == (3, model.config.vocab_size)
    torch.testing.assert_close(nn.functional.cross_entropy(logits, labels), expected)
    assert masked_lm.validation_loss(model, [batch]) == pytest.approx(expected.item(), rel=1e-5)
    assert model(**batch).logits.shape[1] == 9


def test_unigram_entropy_is_that_of_the_labels():
    labels = torch.tensor([[5, 5, -100, 6, 7, -100]])
    assert masked_lm.unigram_entropy([{"labels": labels}]) == pytest.approx(1.5 * math.log(2))


def test_gold_sparsity_against_a_count_by_hand():
    model, batch = tiny_model(), tiny_batch((9, 5))
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    set_normalizer(model, Normalizer(1.0))
    assert masked_lm.gold_sparsity(model, [batch]) == 0.0
    set_normalizer(model, Normalizer(2.0))
    found = []
    for length, row in ((9, 0), (5, 1)):
        with torch.no_grad():
            attentions = model(input_ids=batch["input_ids"][row : row + 1, :length], output_attentions=True).attentions
        found += [(layer == 0).float().mean((-2, -1)).flatten() for layer in attentions]
    assert masked_lm.gold_sparsity(model, [batch]) == pytest.approx(torch.cat(found).mean().item(), abs=1e-6)
    assert torch.cat(found).mean() > 0.1


# ---- a start from statistics ----


def test_cooccurrences_against_a_count_by_hand():
    rows = torch.randint(0, 9, (5, 12), generator=torch.Generator().manual_seed(0)).tolist()
    words = torch.tensor([3, 5, 8, 4])
    expected = torch.zeros(4, 4)
    for row in rows:
        for i, left in enumerate(row):
            for j, right in enumerate(row):
                if 0 < abs(i - j) <= 4 and left in words and right in words:
                    expected[words.tolist().index(left), words.tolist().index(right)] += 1 / abs(i - j)
    lengths = torch.full((5,), 12)
    blocks = TokenBlocks(torch.tensor(rows).flatten().int(), torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]))
    torch.testing.assert_close(statistical_init.cooccurrences(blocks, words), expected)


def test_words_in_the_same_company_get_the_same_vector():
    """Words 5 and 6 stand between the same neighbours, 20 and 21 between others."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(400):
        group = int(torch.randint(2, (1,), generator=generator))
        company = torch.randint(7 + 5 * group, 12 + 5 * group, (4,), generator=generator).tolist()
        company.insert(2, 5 + 15 * group + int(torch.randint(2, (1,), generator=generator)))
        rows += company
    blocks = TokenBlocks(torch.tensor(rows).int(), torch.arange(0, len(rows) + 1, 5))
    torch.manual_seed(0)
    vectors = statistical_init.word_vectors(blocks, torch.tensor([5, 6, 20, 21, *range(7, 17)]), 8)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(14))
    assert vectors[0] @ vectors[1] > 0.8 > 0.3 > vectors[0] @ vectors[2]
    assert vectors[2] @ vectors[3] > 0.8


def test_heads_that_look_beside_them():
    query, key = torch.zeros(2, 4 * 8, 32)
    statistical_init.look_beside(query, key, heads=4, positions=50)
    table = statistical_init.sinusoids(50, 32)
    for head, offset in enumerate((-1, 1, -2, 2)):
        rows = slice(8 * head, 8 * head + 8)
        scores = (table @ query[rows].T) @ (table @ key[rows].T).T
        best = scores.argmax(1)
        assert torch.equal(best[5:45], torch.arange(5, 45) + offset)


def test_a_start_from_statistics_writes_all_it_promises(corpus, tmp_path):
    new = dataclasses.replace(TINY, start="statistics", dropout=0.0)
    torch.manual_seed(0)
    model, tokenizer = new.make(corpus, tmp_path)
    embeddings, layer = model.roberta.embeddings, model.roberta.encoder.layer[1].attention
    assert torch.equal(layer.self.query.weight, layer.self.key.weight)
    assert torch.equal(layer.output.dense.weight, layer.self.value.weight.T)
    table = embeddings.position_embeddings.weight
    assert len(table) == 24 + 2
    first, second = (table[2:-3] * table[3:-2]).sum(1), (table[2:-3] * table[5:]).sum(1)
    assert first.std() < 1e-6 < 1e-5 < (first - second).min()  # products follow the distance alone, and fall with it
    counts = token_blocks(corpus, tokenizer, "train", 24).ids.long().bincount(minlength=300)
    offset = model.lm_head.decoder.bias - (counts + 0.5).log()
    torch.testing.assert_close(offset, offset[:1].expand(300), rtol=0, atol=1e-5)
    for family in ("albert", "distilbert"):
        with pytest.raises(UserError, match="start=statistics works for the families roberta, bert"):
            dataclasses.replace(new, family=family).make(corpus, tmp_path)


def test_a_start_from_statistics_between_two_texts(corpus, tmp_path):
    new = dataclasses.replace(TINY, family="bart", start="statistics", dropout=0.0, hidden_size=64)
    torch.manual_seed(0)
    model, tokenizer = new.make(corpus, tmp_path)
    for half in (model.model.encoder, model.model.decoder):
        table = half.embed_positions.weight
        assert len(table) == 24 + 2
        assert (table[2:-3] * table[3:-2]).sum(1).std() < 1e-6
        for attention in [
            each for layer in half.layers for each in (layer.self_attn, getattr(layer, "encoder_attn", None))
        ]:
            if attention is None:
                continue
            assert torch.equal(attention.out_proj.weight, attention.v_proj.weight.T)
            beside = attention is half.layers[0].self_attn
            assert torch.equal(attention.q_proj.weight, attention.k_proj.weight) != beside
    counts = token_blocks(corpus, tokenizer, "train", 24).ids.long().bincount(minlength=300)
    offset = model.final_logits_bias[0] - (counts + 0.5).log()
    torch.testing.assert_close(offset, offset[:1].expand(300), rtol=0, atol=1e-5)

    seen = {}

    class Look:
        causal = True

        def __call__(self, q, k, v, valid, layer):
            scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~torch.ones(24, 24).tril().bool(), -math.inf)
            seen[layer] = scores.softmax(-1)
            return v

    ids = torch.full((1, 24), 100)
    with torch.no_grad(), plugged(model, Look(), "dec"):
        model(input_ids=ids, decoder_input_ids=ids)
    tokens = torch.arange(4, 20)
    for head, offset in enumerate((-1, -2)):
        missed = seen[0][0, head, tokens].argmax(-1) - (tokens + offset)
        assert missed.abs().max() <= 1, f"head {head} looks elsewhere"  # what is alike, the word itself, pulls a little


def test_a_start_from_statistics_where_positions_turn_vectors(corpus, tmp_path):
    new = dataclasses.replace(
        TINY, family="modernbert", start="statistics", dropout=0.0, hidden_size=64, global_every=2
    )
    torch.manual_seed(0)
    model, tokenizer = new.make(corpus, tmp_path)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    second = model.model.layers[1].attn
    query, key, value = second.Wqkv.weight.chunk(3)
    assert torch.equal(query, key)
    assert torch.equal(second.Wo.weight, value.T)
    counts = token_blocks(corpus, tokenizer, "train", 24).ids.long().bincount(minlength=300)
    offset = model.decoder.bias - (counts + 0.5).log()
    torch.testing.assert_close(offset, offset[:1].expand(300), rtol=0, atol=1e-5)

    seen = {}

    class Look:
        def __call__(self, q, k, v, valid, layer):
            seen[layer] = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            return v

    ids = torch.full((1, 24), 100)  # one word everywhere: what words say of each other is noise in so small a model
    with torch.no_grad(), plugged(model, Look()):
        model(input_ids=ids)
    tokens = torch.arange(4, ids.shape[1] - 4)
    for head, offset in enumerate((-1, 1)):
        assert seen[0][0, head, tokens, tokens + offset].min() > 0.9, f"head {head} looks elsewhere"


def test_layers_with_a_window_are_for_relative_positions():
    with pytest.raises(UserError, match=r"model\.global_every=3, but every layer of a roberta attends to all tokens"):
        dataclasses.replace(TINY, global_every=3)
    with pytest.raises(UserError, match=r"model\.local_window must be 1 or more, got 0"):
        dataclasses.replace(TINY, family="modernbert", local_window=0)
