"""What may stand in a setting, and what is said where it may not: names, numbers that are none, values nearby."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from sparsefinder.errors import UserError, closest, meant, one_of
from sparsefinder.experiment.instantiate import construct
from sparsefinder.extract import ExtractSettings
from sparsefinder.finetune import FinetuneSettings, NewModel
from sparsefinder.models.trackers import EXTRA, check_trackers
from sparsefinder.models.transformers_internals import trackers
from sparsefinder.patterns.distance import Distance
from sparsefinder.patterns.longformer import Longformer
from sparsefinder.patterns.window import Window
from sparsefinder.pipeline import chosen_stages
from sparsefinder.quantization import ProjectSettings
from tests.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Numbers:
    share: float = 0.5
    most: Annotated[float, "or infinite"] = 1.0
    levels: tuple[float, ...] = ()
    name: str = ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": math.nan}, "here.share must be a finite number, got nan"),
        ({"share": math.inf}, "here.share must be a finite number, got inf"),
        ({"share": -math.inf}, "got -inf"),
        ({"most": math.nan}, "here.most must be a finite number, got nan"),
        ({"levels": [0.1, math.nan]}, "here.levels must be a finite number, got nan"),
        ({"nam": "x"}, "its settings are share, most, levels, name; did you mean name?"),
    ],
)
def test_numbers_that_are_none_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        construct(Numbers, values, "here")


def test_infinity_stays_where_it_means_something() -> None:
    assert construct(Numbers, {"most": math.inf, "name": "nan"}).most == math.inf
    assert construct(ProjectSettings, {"clip": math.inf}).clip == math.inf
    assert construct(Distance, {"distance": "minkowski", "p": math.inf}).p == math.inf
    with pytest.raises(UserError, match=r"pattern\.threshold must be a finite number, got inf"):
        construct(Distance, {"threshold": math.inf}, "pattern")
    with pytest.raises(UserError, match=r"extract\.shard_size must be a finite number"):
        construct(ExtractSettings, {"corpus": object(), "shard_size": math.inf}, "extract")


@pytest.mark.parametrize(
    "make", [lambda n: Window(width=n), lambda n: Longformer(width=n)], ids=["window", "longformer"]
)
@pytest.mark.parametrize("width", [-4, -3, -2, -1, 0, 2, 4])
def test_the_value_advised_is_a_valid_one(make: Any, width: int) -> None:
    with pytest.raises(UserError, match="try ") as refused:
        make(width)
    make(int(str(refused.value).rpartition("try ")[2]))


def test_the_name_that_was_meant() -> None:
    assert one_of(["kmeans", "window"], "Kmean") == "choose one of kmeans, window; did you mean kmeans?"
    assert one_of(["kmeans", "window"], "xyz") == "choose one of kmeans, window"
    assert meant(["kmeans"], "kmens", "pattern=") == "; did you mean pattern=kmeans?"
    assert closest([], "a") == []
    assert closest(["docstrings", "text"], "doc") == ["docstrings"]
    with pytest.raises(UserError, match="did you mean score"):
        chosen_stages("scores")
    with pytest.raises(UserError, match="did you mean min"):
        ProjectSettings(distance="mim")
    with pytest.raises(UserError, match=r"report$"):  # nothing was typed, nothing was meant
        chosen_stages([])


def test_trackers_are_looked_for_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sparsefinder.models.trackers.trackers", lambda: {"mlflow": False, "tensorboard": True, "wandb": False}
    )
    for fine in ("none", "all", "tensorboard", ("tensorboard",), ()):
        check_trackers("finetune.report_to", fine)
    wrong = {
        "tensorbord": "finetune.report_to=tensorbord is unknown; choose one of none, all, mlflow, tensorboard, wandb; did",
        "wandb": "pip install 'sparsefinder[trackers]', or choose one of none, tensorboard",
        "mlflow": "finetune.report_to=mlflow is not installed: pip install mlflow",
    }
    for name, message in wrong.items():
        for given in (name, ("tensorboard", name)):
            with pytest.raises(UserError) as refused:
                FinetuneSettings(corpus=None, model=NewModel(), report_to=given)  # type: ignore[arg-type]
            assert message in str(refused.value)


def test_every_tracker_of_transformers_is_known_and_the_extra_has_them() -> None:
    assert set(EXTRA) <= set(trackers())
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["trackers"]
    assert {requirement.partition(">")[0] for requirement in extra} == {*EXTRA, "sparsefinder[pipeline]"}
