"""fit, attach, detach: what is attached is what was learned, through whatever happens to the model."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from tiny_index import LENGTHS, Fitted, sentences
from tiny_models import tiny_batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

import sparsefinder
from sparsefinder.attention import Masked
from sparsefinder.errors import UserError
from sparsefinder.models import plugged, set_normalizer
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.routed import Routed
from sparsefinder.sparse_model.attaching import attachment
from sparsefinder.sparse_model.texts import read_texts, special_tokens


@pytest.fixture
def attached(fitted: Fitted):
    """A model with the index attached, and its states."""
    model = fitted.model()
    sparsefinder.attach(model, fitted.index, density=0.3, auto=False)
    return model, fitted.states(model)


def test_what_is_attached_is_the_predicted_graph(fitted: Fitted, attached) -> None:
    model, states = attached
    index, setting = fitted.index, attachment(model).setting
    plain = fitted.model()
    dense = fitted.states(plain)
    with plugged(plain, Masked(index.attention(setting).pattern, index.normalizer)):
        torch.testing.assert_close(states, fitted.states(plain), atol=1e-5, rtol=1e-5)
    assert (states - dense).norm() > 0.01 * dense.norm()  # or nothing was attached


def test_detached_is_the_model_from_before(fitted: Fitted, attached) -> None:
    model, _ = attached
    before, keys = fitted.states(fitted.model()), set(model.state_dict())
    sparsefinder.detach(model)
    assert torch.equal(fitted.states(model), before)
    assert set(model.state_dict()) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(UserError, match="nothing is attached to this RobertaModel"):
        sparsefinder.detach(model)


def test_weights_cannot_be_asked_for_while_attached(fitted: Fitted, attached) -> None:
    model, _ = attached
    with pytest.raises(UserError, match=r"gives no weights: leave out output_attentions, or call sparsefinder\.detach"):
        model(**fitted.batch, output_attentions=True)


def test_the_last_one_attached_counts(fitted: Fitted, attached) -> None:
    model, states = attached
    sparsefinder.attach(model, fitted.index, density=0.05, auto=False)
    other = fitted.states(model)
    assert not torch.allclose(states, other)
    sparsefinder.attach(model, fitted.index, density=0.3, auto=False)
    assert torch.equal(fitted.states(model), states)
    sparsefinder.detach(model)
    assert torch.equal(fitted.states(model), fitted.states(fitted.model()))


def test_within_a_block_of_plugged(fitted: Fitted, attached) -> None:
    model, states = attached
    attention = fitted.index.attention(attachment(model).setting)
    with plugged(model, attention):
        assert torch.equal(fitted.states(model), states)
        with pytest.raises(UserError, match="plugged into this model for a while"):
            sparsefinder.detach(model)
        with pytest.raises(UserError, match="plugged into this model for a while"):
            sparsefinder.attach(model, fitted.index)
    assert torch.equal(fitted.states(model), states)


def test_short_texts_are_those_of_the_dense_model_to_the_digit(fitted: Fitted) -> None:
    model, dense = fitted.model(), fitted.model()
    sparsefinder.attach(model, fitted.index, density=0.3)
    with torch.inference_mode():
        for batch in (fitted.batch, {"input_ids": fitted.batch["input_ids"][:1]}):
            assert torch.equal(model(**batch)[0], dense(**batch)[0])


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)  # what was saved two lines above: a whole module is no weights


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_whole])
def test_copies_are_attached_and_apart(copied, fitted: Fitted, attached) -> None:
    model, states = attached
    other = copied(model)
    assert torch.equal(fitted.states(other), states)
    sparsefinder.detach(other)
    assert torch.equal(fitted.states(other), fitted.states(fitted.model()))
    assert torch.equal(fitted.states(model), states)
    sparsefinder.attach(other, fitted.index, density=0.3, auto=False)
    sparsefinder.detach(model)
    assert torch.equal(fitted.states(other), states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype, fitted: Fitted, attached) -> None:
    model, states = attached
    other = fitted.states(model.to(dtype))
    assert other.dtype == dtype
    exact = {torch.float64: 1e-4}.get(dtype, 0.3)
    assert (other.float() - states).norm() < exact * states.norm()
    sparsefinder.detach(model)
    assert torch.equal(fitted.states(model), fitted.states(fitted.model().to(dtype)))


def test_autocast(fitted: Fitted, attached) -> None:
    model, states = attached
    with torch.autocast("cpu", torch.bfloat16):
        assert (fitted.states(model).float() - states).norm() < 0.3 * states.norm()


def test_padding_and_the_rest_of_a_batch_change_nothing(fitted: Fitted, attached) -> None:
    model, _ = attached
    batch = tiny_batch(LENGTHS)
    with torch.inference_mode():
        together = model(**batch)[0]
        for row, length in enumerate(LENGTHS):
            alone = model(**{name: x[row : row + 1, :length] for name, x in batch.items()})[0]
            torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(checkpointing, fitted: Fitted) -> None:
    def gradient(attend) -> torch.Tensor:
        model = tiny_model()
        attend(model)
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**fitted.batch)[0].square().mean().backward()
        return model.base_model.encoder.layer[0].attention.self.query.weight.grad

    sparse = gradient(lambda m: sparsefinder.attach(m, fitted.index, density=0.3, auto=False))
    dense = gradient(lambda m: None)
    assert sparse.isfinite().all()
    assert (sparse - dense).norm() > 1e-3 * dense.norm()
    setting = fitted.index.setting(sparsefinder.sparse_model.curves.Target("density", 0.3), False, "auto")
    masked = Masked(fitted.index.attention(setting).pattern, fitted.index.normalizer)
    with plugged(model := tiny_model(), masked):
        model.eval()(**fitted.batch)[0].square().mean().backward()
    expected = model.base_model.encoder.layer[0].attention.self.query.weight.grad
    torch.testing.assert_close(sparse, expected, atol=1e-4, rtol=1e-2)


@pytest.mark.parametrize("head", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_any_head(head, fitted: Fitted, attached, tmp_path) -> None:
    fitted.model().save_pretrained(tmp_path)
    model = head.from_pretrained(tmp_path)
    sparsefinder.attach(model, fitted.index, density=0.3, auto=False)
    assert torch.equal(fitted.states(model), attached[1])
    sparsefinder.detach(model.base_model)  # a part will do
    assert torch.equal(fitted.states(model), fitted.states(fitted.model()))


def test_threads_do_not_meet(fitted: Fitted) -> None:
    albert = tiny_model("albert")
    index = sparsefinder.fit(albert, tiny_tokenizer(), sentences())
    sparsefinder.attach(albert, index, density=0.3, auto=False)
    batches = [tiny_batch((length, 5)) for length in (12, 20, 30, 38)]
    with torch.inference_mode():
        expected = [albert(**batch)[0] for batch in batches]
    found: list[bool] = []

    def read(which: int) -> None:
        with torch.inference_mode():
            found.extend(torch.allclose(albert(**batches[which])[0], expected[which], atol=1e-6) for _ in range(5))

    threads = [threading.Thread(target=read, args=(which,)) for which in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 20


@pytest.mark.parametrize(
    "family", ["bert", "distilbert", "electra", "albert", "modernbert", "camembert", "xlm-roberta"]
)
def test_every_family(family) -> None:
    model = tiny_model(family)
    index = sparsefinder.fit(model, tiny_tokenizer(), sentences(), pattern=Routed(level=1e3))
    with torch.inference_mode():
        dense = model(**tiny_batch())[0]
        sparsefinder.attach(model, index, auto=False)
        mask = tiny_batch()["attention_mask"].bool()
        torch.testing.assert_close(model(**tiny_batch())[0][mask], dense[mask], atol=1e-4, rtol=1e-3)  # all pairs


def test_the_same_seed_gives_the_same_index(fitted: Fitted) -> None:
    again = sparsefinder.fit(tiny_model(), tiny_tokenizer(), ({"text": text} for text in sentences()))
    other = sparsefinder.fit(tiny_model(), tiny_tokenizer(), sentences(), seed=1)
    first, same, drawn = (i.learned.artefacts["key_centroids"].layers[0] for i in (fitted.index, again, other))
    assert torch.equal(first, same)
    assert not torch.equal(first, drawn)
    assert torch.equal(again.curves.density, fitted.index.curves.density)
    assert again.quality == fitted.index.quality


def test_a_long_text_is_many() -> None:
    tokenizer, long = tiny_tokenizer(), " ".join(sentences(9))
    reading = read_texts(long, tokenizer, length=12, tokens=100, seed=0)
    stretches = [*reading.held_out, *reading.training]
    assert all(ids.shape == (1, 12) for ids in stretches)
    assert 100 <= reading.tokens <= 124
    whole = tokenizer(long)["input_ids"]
    before, after = special_tokens(tokenizer)
    inside = [i for ids in stretches for i in ids[0, len(before) : 12 - len(after)].tolist()]
    assert inside == whole[len(before) : len(before) + len(inside)]  # one after the other, nothing twice
    begins = read_texts([long, *sentences(20)], tokenizer, length=12, tokens=100, seed=0)
    assert len(begins.training) + len(begins.held_out) == 10  # enough without


def test_targets(fitted: Fitted) -> None:
    curves = fitted.index.curves
    model = fitted.model()
    for target in ({"density": 0.1}, {"recall": 0.3}, {"loss_tolerance": 0.5}):
        sparsefinder.attach(model, fitted.index, **target)
        values = attachment(model).setting.values
        if "density" in target:
            assert curves.read("density", values).mean() == pytest.approx(0.1, abs=0.02)
        if "recall" in target:
            assert (curves.read("recall", values) >= 0.3 - 1e-3).all()


def test_an_entmax_model(fitted: Fitted) -> None:
    model = tiny_model()
    set_normalizer(model, Normalizer(1.5))
    index = sparsefinder.fit(model, tiny_tokenizer(), sentences(), pattern=Routed(level=1e3))
    assert index.base.alpha == 1.5
    dense = fitted.states(model)
    sparsefinder.attach(model, index, auto=False)
    torch.testing.assert_close(fitted.states(model), dense, atol=1e-4, rtol=1e-3)
    sparsefinder.detach(model)
    assert torch.equal(fitted.states(model), dense)
    with pytest.raises(UserError, match=r"alpha of its entmax .*, this one has 1\.5"):
        sparsefinder.attach(model, fitted.index)


@pytest.mark.parametrize("pattern", ["kmeans", "quantize", "distance", "lowrank", "window", "routing_trained"])
def test_other_patterns(pattern, fitted: Fitted) -> None:
    index = sparsefinder.fit(tiny_model(), tiny_tokenizer(), sentences(), pattern=pattern, window=3)
    model = fitted.model()
    sparsefinder.attach(model, index, density=0.5, auto=False)
    assert fitted.states(model).isfinite().all()


def test_explain(fitted: Fitted, attached) -> None:
    model, _ = attached
    # less than asked for: clusters of a single key are never taken, and in texts of some 20 tokens most are
    expected = fitted.index.curves.read("density", attachment(model).setting.values).mean()
    found = sparsefinder.explain(model, sentences(3, seed=5), tiny_tokenizer())
    assert len(found.heads) == 4
    assert len(found.layers) == 2
    assert abs(sum(row["density"] for row in found.heads) / 4 - expected) < 0.1
    assert "native" in str(found) or "blocks" in str(found)
    sparsefinder.detach(model)
    with pytest.raises(UserError, match="nothing is attached"):
        sparsefinder.explain(model, sentences(1), tiny_tokenizer())


WRONG = {
    "tokenizer is a NoneType": lambda m, t: sparsefinder.fit(m, None, sentences()),
    "tokens=0: give a whole number": lambda m, t: sparsefinder.fit(m, t, sentences(), tokens=0),
    "length='30': this model reads": lambda m, t: sparsefinder.fit(m, t, sentences(), length="30"),
    "texts is a int": lambda m, t: sparsefinder.fit(m, t, 3),
    "0 of 0 texts": lambda m, t: sparsefinder.fit(m, t, []),
    "0 of 2 texts have 4 tokens": lambda m, t: sparsefinder.fit(m, t, ["", "  "]),
    "1 of 1 texts": lambda m, t: sparsefinder.fit(m, t, "a model attends to the keys"),
    "texts holds a int: give strings": lambda m, t: sparsefinder.fit(m, t, ["a", 3]),
    "give the column of text": lambda m, t: sparsefinder.fit(m, t, [{"a": "x", "b": "y"}]),
    "this model reads up to 38 tokens": lambda m, t: sparsefinder.fit(m, t, sentences(), length=512),
    "pattern=rooted is unknown.*did you mean routed": lambda m, t: sparsefinder.fit(
        m, t, sentences(), pattern="rooted"
    ),
    "give a name such as 'routed'": lambda m, t: sparsefinder.fit(m, t, sentences(), pattern=3),
    "dict is no model of transformers": lambda m, t: sparsefinder.fit({}, t, sentences()),
    "longformer, whose attention cannot be replaced": lambda m, t: sparsefinder.fit(
        tiny_model("longformer", attention_window=[4, 4]), t, sentences()
    ),
    "an encoder configured as a decoder": lambda m, t: sparsefinder.fit(
        tiny_model("roberta", is_decoder=True), t, sentences()
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_input_to_fit_is_one_line(message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        WRONG[message](tiny_model(), tiny_tokenizer())
    assert "\n" not in str(caught.value)


def test_wrong_input_to_attach_is_one_line(fitted: Fitted) -> None:
    wrong = {
        "index is a str": lambda m: sparsefinder.attach(m, "index"),
        "density and recall are given: choose one": lambda m: sparsefinder.attach(m, fitted.index, density=1, recall=1),
        r"density=1.5: give a number above 0": lambda m: sparsefinder.attach(m, fitted.index, density=1.5),
        "recall=True": lambda m: sparsefinder.attach(m, fitted.index, recall=True),
        "executor=fast is unknown": lambda m: sparsefinder.attach(m, fitted.index, executor="fast"),
        "learned for other weights": lambda m: sparsefinder.attach(tiny_model(seed=1), fitted.index),
        "4 heads": lambda m: sparsefinder.attach(tiny_model(num_attention_heads=4), fitted.index),
        "as its family": lambda m: sparsefinder.attach(tiny_model("bert"), fitted.index),
    }
    for message, call in wrong.items():
        if message == "4 heads":
            message = "with 2 heads"
        model = fitted.model()
        with pytest.raises(UserError, match=message) as caught:
            call(model)
        assert "\n" not in str(caught.value)
        assert torch.equal(fitted.states(model), fitted.states(fitted.model()))
    sparsefinder.attach(tiny_model(seed=1), fitted.index, another_base_model=True)


def test_another_attention_asked_for_afterwards_is_refused(fitted: Fitted, attached) -> None:
    model, _ = attached
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match="told afterwards to attend with eager"):
        fitted.states(model)
    model.set_attn_implementation("sparsefinder")
    with pytest.raises(UserError, match=r"60 tokens.*38 at most"):
        model(torch.zeros(1, 60, dtype=torch.int64))


def test_importing_stays_light() -> None:
    code = (
        "import sys, sparsefinder; assert 'fit' in dir(sparsefinder); "
        "assert not {'torch', 'transformers', 'yaml'} & set(sys.modules); "
        "assert callable(sparsefinder.fit); print(sparsefinder.Index.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "Index\n"), done.stderr
