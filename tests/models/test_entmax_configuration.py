"""A model that was finetuned with entmax stays one, whichever way it is loaded, asked for, changed, copied and saved."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tiny_batch, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    EncoderDecoderModel,
)

from sparsefinder.errors import UserError
from sparsefinder.models import REGISTERED, get_normalizer, set_normalizer
from sparsefinder.models.entmax_configuration import SAVED_AS
from sparsefinder.numerics.normalizers import Normalizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    set_normalizer(model, Normalizer(1.5))
    return save_tiny(tmp_path_factory.mktemp("entmax"), model)


def weights_of(model) -> torch.Tensor:
    """Attention probabilities of both layers, ``(L, B, H, N, N)``."""
    with torch.no_grad():
        return torch.stack(model.eval().base_model(**tiny_batch(), output_attentions=True).attentions)


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    return weights_of(AutoModel.from_pretrained(folder))


def test_attention_weights_are_those_of_entmax(expected) -> None:
    torch.testing.assert_close(expected.sum(-1), torch.ones_like(expected[..., 0]))
    assert (expected[:, 1, :, :, 5:] == 0).all()  # padding
    assert (expected[:, 0] == 0).float().mean() > 0.3


def saved(model, where: Path, **options) -> Path:
    model.save_pretrained(where, **options)
    return where


def resized(folder: Path):
    model = AutoModelForMaskedLM.from_pretrained(folder)
    model.resize_token_embeddings(30)
    return model


def through_a_configuration(folder: Path, where: Path):
    config = AutoConfig.from_pretrained(folder)
    config.save_pretrained(where)
    made = AutoModel.from_config(AutoConfig.from_pretrained(where))
    made.load_state_dict(AutoModel.from_pretrained(folder, config=AutoConfig.from_pretrained(where)).state_dict())
    return made


WAYS = {
    "at once": lambda folder, where: AutoModel.from_pretrained(saved(AutoModel.from_pretrained(folder), where)),
    "shards": lambda folder, where: AutoModel.from_pretrained(
        saved(AutoModelForMaskedLM.from_pretrained(folder), where, max_shard_size="2KB")
    ),
    "other heads": lambda folder, where: AutoModelForTokenClassification.from_pretrained(
        saved(AutoModelForSequenceClassification.from_pretrained(folder), where)
    ),
    "resized": lambda folder, where: AutoModel.from_pretrained(saved(resized(folder), where)),
    "float64": lambda folder, where: AutoModel.from_pretrained(
        saved(AutoModel.from_pretrained(folder, dtype=torch.float64), where), dtype=torch.float32
    ),
    "deep copy": lambda folder, where: copy.deepcopy(AutoModel.from_pretrained(folder)),
    "configuration": through_a_configuration,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving_keeps_entmax(way, folder, expected, tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing else was asked for: nothing to warn of
        model = WAYS[way](folder, tmp_path)
        torch.testing.assert_close(weights_of(model), expected)
    assert get_normalizer(model) == Normalizer(1.5)
    if (tmp_path / "config.json").exists():
        written = json.loads((tmp_path / "config.json").read_text())
        assert (written["attention_alpha"], written["attn_implementation"]) == (1.5, SAVED_AS)


def changed(change):
    """Load as usual, then ``change(model)``."""

    def load(folder: Path):
        model = AutoModel.from_pretrained(folder)
        change(model)
        return model

    return load


ASKED = {  # how, and whether another attention was asked for
    "eager": (lambda folder: AutoModel.from_pretrained(folder, attn_implementation="eager"), True),
    "sdpa": (lambda folder: AutoModel.from_pretrained(folder, attn_implementation="sdpa"), True),
    "weights and eager": (
        lambda folder: AutoModel.from_pretrained(folder, output_attentions=True, attn_implementation="eager"),
        True,
    ),
    "set later": (changed(lambda model: model.set_attn_implementation("eager")), True),
    "weights": (lambda folder: AutoModel.from_pretrained(folder, output_attentions=True), False),
    "weights, set later": (changed(lambda model: setattr(model.config, "output_attentions", True)), False),
}


@pytest.mark.parametrize("way", ASKED)
def test_asking_for_another_attention_says_that_entmax_stays(way, folder, expected, tmp_path) -> None:
    load, other = ASKED[way]
    with pytest.warns(UserWarning, match=r"would be softmax.*attention_alpha=1.5") if other else nullcontext():
        torch.testing.assert_close(weights_of(load(folder)), expected)
    load(folder).save_pretrained(tmp_path)
    torch.testing.assert_close(weights_of(AutoModel.from_pretrained(tmp_path)), expected)


def test_inside_another_model(folder, expected, tmp_path) -> None:
    made = EncoderDecoderModel.from_encoder_decoder_pretrained(folder, folder)
    made.save_pretrained(tmp_path)
    model = EncoderDecoderModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(weights_of(model.encoder), expected)
    ids = tiny_batch((9,))["input_ids"]
    with torch.no_grad():
        out = model.decoder(ids, encoder_hidden_states=torch.randn(1, 4, 16), output_attentions=True)
    inside, across = out.attentions[0], out.cross_attentions[0]
    assert (inside.triu(1) == 0).all()
    assert across.shape[-2:] == (9, 4)
    for probabilities in (inside, across):
        torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]))
        assert (probabilities == 0).any()


def test_only_configurations_with_an_alpha_are_changed(tmp_path) -> None:
    model = tiny_model()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="'eager' instead"):
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    model.config.attention_alpha = 1.0  # softmax
    model.save_pretrained(tmp_path)
    assert "attn_implementation" not in json.loads((tmp_path / "config.json").read_text())


def test_a_class_that_never_asks_is_refused() -> None:
    with pytest.raises(ValueError, match="LongformerForMaskedLM never calls another attention than its own"):
        AutoModelForMaskedLM.from_config(tiny_config("longformer", attention_window=[4, 4], attention_alpha=1.5))


@pytest.mark.parametrize("unknown", ["softcap", "s_aux"])
def test_what_entmax_attention_does_not_know_is_refused(unknown) -> None:
    from sparsefinder.models.replacement.registered_function import attend

    module = torch.nn.Module()
    with pytest.raises(UserError, match=f"attends with {unknown}"):
        attend(module, *torch.zeros(3, 1, 1, 2, 4), None, **{unknown: torch.ones(1)})


@pytest.mark.parametrize(
    "imports",
    [
        "import sparsefinder; assert not {'torch', 'transformers'} & set(sys.modules); from transformers import AutoModel",
        "from transformers import AutoModel, RobertaModel; import sparsefinder",
    ],
)
def test_importing_the_package_is_enough(imports, folder, tmp_path) -> None:
    code = (
        f"import sys; {imports}; m = AutoModel.from_pretrained({str(folder)!r}); m.save_pretrained({str(tmp_path)!r}); "
    )
    code += "print(m.config._attn_implementation, m(output_attentions=True, input_ids=m.dummy_inputs['input_ids']) is not None)"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [REGISTERED, "True"]
    assert json.loads((tmp_path / "config.json").read_text())["attn_implementation"] == SAVED_AS
