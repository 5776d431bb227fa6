"""An index and its model on disk: equal in another process, and never used where it was cut, altered or another's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_index import Fitted, sentences
from tiny_models import save_tiny, tiny_config, tiny_model, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    EncoderDecoderModel,
)

import sparsefinder
from sparsefinder import Index
from sparsefinder.errors import UserError
from sparsefinder.models import load_masked_lm
from sparsefinder.sparse_model import card
from sparsefinder.sparse_model.attaching import attachment
from tests.conftest import GRAPH

FILES = ("sparsefinder.json", "sparsefinder.safetensors")


@pytest.fixture
def saved(fitted: Fitted, tmp_path: Path):
    """A folder with model and index, and the states of that model."""
    model = tiny_model()
    sparsefinder.attach(model, fitted.index, density=0.3, auto=False)
    save_tiny(tmp_path / "sparse", model)
    return tmp_path / "sparse", fitted.states(model)


@pytest.mark.parametrize("given", [3, None, "nowhere", __file__])
def test_an_index_is_loaded_from_a_folder(given: object) -> None:
    with pytest.raises(
        UserError, match=r"Index\.load needs the folder that Index\.save or save_pretrained wrote, .* is none"
    ):
        Index.load(given)  # type: ignore[arg-type]


def test_an_index_alone(fitted: Fitted, tmp_path: Path) -> None:
    fitted.index.save(tmp_path)
    again = Index.load(tmp_path)
    assert again.base == fitted.index.base
    assert (again.configuration, again.quality) == (fitted.index.configuration, fitted.index.quality)
    states = []
    for index in (fitted.index, again):
        model = fitted.model()
        sparsefinder.attach(model, index, recall=0.8, auto=False)
        states.append(fitted.states(model))
    assert torch.equal(*states)
    again.save(tmp_path / "again")
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(FILES)


LOADERS = {
    "load": sparsefinder.load,
    "AutoModel": AutoModel.from_pretrained,
    "masked LM": AutoModelForMaskedLM.from_pretrained,
    "another head": AutoModelForSequenceClassification.from_pretrained,
    "with a report": lambda folder: AutoModel.from_pretrained(folder, output_loading_info=True)[0],
    "with its configuration": lambda folder: AutoModel.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder)
    ),
    "eager": lambda folder: AutoModel.from_pretrained(folder, attn_implementation="eager"),
}


@pytest.mark.parametrize("way", LOADERS)
def test_a_saved_model_is_attached_again(way, fitted: Fitted, saved, tmp_path) -> None:
    folder, states = saved
    model = LOADERS[way](folder)
    torch.testing.assert_close(fitted.states(model), states, atol=1e-6, rtol=0)
    assert attachment(model).setting.target == "density=0.3"
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(fitted.states(AutoModel.from_pretrained(tmp_path / "again")), states, atol=1e-6, rtol=0)
    sparsefinder.detach(model)
    torch.testing.assert_close(fitted.states(model), fitted.states(fitted.model()), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "dense")
    assert not [name for name in FILES if (tmp_path / "dense" / name).exists()]
    assert "sparsefinder" not in (tmp_path / "dense" / "config.json").read_text()


def test_in_another_process(fitted: Fitted, saved, tmp_path) -> None:
    folder, states = saved
    torch.save({"batch": fitted.batch, "states": states}, tmp_path / "expected.pt")
    code = f"""
import sparsefinder, torch
from transformers import AutoModel
expected = torch.load({str(tmp_path / "expected.pt")!r})
mask = expected["batch"]["attention_mask"].bool()
for load in (sparsefinder.load, AutoModel.from_pretrained):
    with torch.inference_mode():
        states = load({str(folder)!r}).base_model(**expected["batch"])[0][mask]
    print((states - expected["states"]).abs().max().item() < 1e-6)
"""
    assert run(code).stdout.split() == ["True", "True"]


def test_without_the_package_the_error_names_it(saved) -> None:
    code = f"from transformers import AutoModel; AutoModel.from_pretrained({str(saved[0])!r})"
    done = run(code, check=False)
    assert done.returncode != 0
    assert "sparsefinder: install it, then import sparsefinder" in done.stderr


def run(code: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_trained_since(fitted: Fitted, tmp_path) -> None:
    model = tiny_model()
    sparsefinder.attach(model, fitted.index, density=0.3, auto=False)
    with torch.no_grad():
        model.base_model.encoder.layer[0].attention.self.query.weight.mul_(1.01)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(fitted.states(AutoModel.from_pretrained(tmp_path)), fitted.states(model))


def test_the_pipeline_reads_the_dense_model(saved, fitted: Fitted) -> None:
    model, _ = load_masked_lm(saved[0])
    torch.testing.assert_close(fitted.states(model), fitted.states(fitted.model()), atol=1e-6, rtol=0)


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_weights(folder: Path) -> None:
    index = {name: (folder / name).read_bytes() for name in FILES}
    config = (folder / "config.json").read_bytes()
    save_tiny(folder, tiny_model(seed=3))
    for name, data in {**index, "config.json": config}.items():
        (folder / name).write_bytes(data)


def other_format(folder: Path) -> None:
    from sparsefinder.sparse_model.index_files import _seal

    content = json.loads((folder / FILES[0]).read_text())
    content = {**content, "format": 99}
    content.pop("seal")
    (folder / FILES[0]).write_text(json.dumps({**content, "seal": _seal(content)}))


DAMAGE = {
    "is missing: copy|holds no index": lambda folder: (folder / FILES[0]).unlink(),
    "safetensors is missing": lambda folder: (folder / FILES[1]).unlink(),
    "json is not what was saved, it was cut or altered|json cannot be read": lambda folder: alter(folder / FILES[0]),
    "is not what was saved with sparsefinder.json": lambda folder: alter(folder / FILES[1]),
    "cut or altered ": lambda folder: (folder / FILES[0]).write_bytes((folder / FILES[0]).read_bytes()[:100]),
    "safetensors is not what was": lambda folder: (folder / FILES[1]).write_bytes(
        (folder / FILES[1]).read_bytes()[:99]
    ),
    "format 99": other_format,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_one_line(message, fitted: Fitted, saved, tmp_path) -> None:
    fitted.index.save(tmp_path / "alone")
    for folder, loaders in (
        (saved[0], (AutoModel.from_pretrained, sparsefinder.load)),
        (tmp_path / "alone", (Index.load,)),
    ):
        DAMAGE[message](folder)
        for load in loaders:
            with pytest.raises(UserError, match=f"{message}|is missing") as caught:
                load(folder)
            assert "\n" not in str(caught.value)


def test_other_weights_are_refused(saved) -> None:
    other_weights(saved[0])
    with pytest.raises(UserError, match="learned for other weights"):
        AutoModel.from_pretrained(saved[0])


def test_a_folder_without_an_index(tmp_path) -> None:
    with pytest.raises(UserError, match="holds a model without an index"):
        sparsefinder.load(save_tiny(tmp_path / "dense"))
    with pytest.raises(UserError, match="there is no such folder"):
        sparsefinder.load(tmp_path / "nowhere")


def test_the_card_says_how_to_load_it(saved, fitted: Fitted) -> None:
    text = (saved[0] / "README.md").read_text()
    assert "sparsefinder.load(" in text
    assert text.count("| 0.") >= len(fitted.index.quality)
    (saved[0] / "README.md").write_text(text.replace("# A model", "# Mine\n\nKept.\n\n# A model"))
    card.write(attachment(AutoModel.from_pretrained(saved[0])), saved[0])
    again = (saved[0] / "README.md").read_text()
    assert "Kept." in again
    assert again.count("## Sparse attention") == 1


def test_pushing_adds_the_section_to_the_card(saved, monkeypatch, tmp_path) -> None:
    """The hub is played by a folder."""
    import huggingface_hub
    from transformers import PreTrainedModel
    from transformers.utils import hub

    (tmp_path / "hub").mkdir()
    pushed: list[str] = []

    def upload(self, folder, repository, *args, **kwargs):
        pushed.extend(sorted(path.name for path in Path(folder).iterdir()))
        (tmp_path / "hub" / "README.md").write_text("# Card of transformers\n")

    def upload_file(self, path_or_fileobj, path_in_repo, **kwargs):
        (tmp_path / "hub" / path_in_repo).write_bytes(Path(path_or_fileobj).read_bytes())

    class Repository:
        def create_repo(self, repository, **kwargs):
            return type("Url", (), {"repo_id": repository})

    monkeypatch.setattr(hub, "hf_api", Repository)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: huggingface_hub.ModelCard("# A card\n"))
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(tmp_path / "hub" / "README.md"))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_file", upload_file)
    AutoModel.from_pretrained(saved[0]).save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/mine")
    assert {*FILES, "config.json", "model.safetensors"} <= set(pushed)
    text = (tmp_path / "hub" / "README.md").read_text()
    assert text.startswith("# Card of transformers")
    assert "## Sparse attention" in text


def test_published_files(fitted: Fitted, tmp_path) -> None:
    index = Index.from_published(
        GRAPH / "golden_projections.pickle", GRAPH / "golden_centroids.pickle", window=3, top_clusters=2
    )
    base = index.base
    model = tiny_model(
        hidden_size=base.heads * base.head_size, num_attention_heads=base.heads, num_hidden_layers=base.layers
    )
    from sparsefinder.models import set_normalizer

    set_normalizer(model, index.normalizer)
    sparsefinder.attach(model, index, auto=False)
    states = fitted.states(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(fitted.states(AutoModel.from_pretrained(tmp_path)), states)
    with pytest.raises(UserError, match="holds no measured curves"):
        sparsefinder.attach(model, index, density=0.1)


def test_published_files_of_two_models_are_refused(fitted: Fitted, tmp_path) -> None:
    other = Index.from_published(GRAPH / "golden_projections.pickle", GRAPH / "golden_centroids.pickle").learned
    cut = [layer[:, :, :, :-1] for layer in other.artefacts["centroids"].content()]
    torch.save(cut, tmp_path / "centroids.pickle")
    with pytest.raises(UserError, match="give two files of one model"):
        Index.from_published(GRAPH / "golden_projections.pickle", tmp_path / "centroids.pickle")


def test_parts_of_another_model_are_not_forgotten_silently(fitted: Fitted, tmp_path, caplog) -> None:
    encoder = fitted.model()
    sparsefinder.attach(encoder, fitted.index)
    decoder = AutoModelForCausalLM.from_config(tiny_config("roberta", is_decoder=True, add_cross_attention=True))
    whole = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    whole.save_pretrained(tmp_path / "whole")
    assert "not saved with the whole" in caplog.text
    assert not (tmp_path / "whole" / FILES[0]).exists()


def test_fit_does_not_change_what_is_attached(fitted: Fitted, saved) -> None:
    folder, states = saved
    model = sparsefinder.load(folder)
    again = sparsefinder.fit(model, tiny_tokenizer(), sentences())
    assert torch.equal(again.curves.density, fitted.index.curves.density)
    torch.testing.assert_close(fitted.states(model), states, atol=1e-6, rtol=0)
