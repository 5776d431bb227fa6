"""The stage export: what a run measured is what its folder attends with, in whatever script loads it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from sparse_model.tiny_index import LENGTHS, sentences
from tiny_models import save_tiny, tiny_batch, tiny_model, tiny_tokenizer

import sparsefinder
from sparsefinder import export, models
from sparsefinder.attention import Masked
from sparsefinder.experiment.configuration import Configuration, Learned
from sparsefinder.models import plugged, set_normalizer
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.routed import Routed
from sparsefinder.patterns.window import Window
from sparsefinder.sparse_model.attaching import attachment
from sparsefinder.storage import tables
from sparsefinder.storage.store import Store

CONFIGURATION = Configuration("routed", Routed(level=0.3), window=3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("run")
    model = tiny_model()
    set_normalizer(model, Normalizer(1.5))
    save_tiny(folder / "given", model)
    artefacts = sparsefinder.fit(model, tiny_tokenizer(), sentences()).learned.artefacts
    for name, artefact in artefacts.items():
        artefact.save(folder / name)
    given = {"model": folder / "given", **{name: folder / name for name in artefacts}}
    return Store(folder / "run", given)


def test_the_folder_attends_as_the_run_did(store: Store) -> None:
    settings = export.ExportSettings((Configuration("window", Window(3)), CONFIGURATION), auto=False)
    assert settings.needs == ("model", "lowrank", "key_centroids")
    export.run(settings, store)
    model = sparsefinder.load(store.run_dir / "sparse_model")
    plain, _ = models.load_masked_lm(store.path("model"))
    pattern = CONFIGURATION.build(Learned.load(store, CONFIGURATION.needs))
    with torch.inference_mode(), plugged(plain, Masked(pattern, Normalizer(1.5))):
        expected = plain(**tiny_batch(LENGTHS))[0]
    with torch.inference_mode():
        measured = model(**tiny_batch(LENGTHS))[0]
        sparsefinder.detach(model)
        dense = model(**tiny_batch(LENGTHS))[0]
    mask = tiny_batch(LENGTHS)["attention_mask"].bool()
    torch.testing.assert_close(measured[mask], expected[mask], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(measured[mask], dense[mask], atol=1e-3)


def test_a_target_is_that_of_calibrate(store: Store, tmp_path: Path) -> None:
    from sparsefinder.experiment.calibration import key_of

    rows = [
        {**key_of(CONFIGURATION), "target": "density=0.2", "layer": layer, "head": head, "value": 0.1 * layer + head}
        for layer in range(2)
        for head in range(2)
    ]
    tables.write(pd.DataFrame(rows), tmp_path, "dials")
    with_dials = Store(tmp_path / "run", {**store.given, "calibration": tmp_path})
    export.run(export.ExportSettings((CONFIGURATION,), target="density=0.2"), with_dials)
    setting = attachment(sparsefinder.load(tmp_path / "run" / "sparse_model")).setting
    assert (setting.target, setting.values, setting.auto) == ("density=0.2", ((0.0, 1.0), (0.1, 1.1)), True)


def test_nothing_learned_is_left_out() -> None:
    settings = export.ExportSettings((Configuration("window", Window(3)), Configuration("window", Window(5))))
    assert "none of the chosen patterns was learned" in settings.left_out
    assert settings.needs == ()
