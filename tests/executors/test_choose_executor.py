"""Who does a piece of work, and what is said of the others."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from sparsefinder.attention import Bucketed, Dense
from sparsefinder.errors import UserError
from sparsefinder.executors.choose_executor import check, choose, explain
from sparsefinder.executors.workload import Work
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.patterns.window import Window
from tests.conftest import ROOT

WORK = Work(torch.device("cpu"), (torch.float32,))


@dataclass(frozen=True)
class Able:
    """An executor of nothing."""

    name: str
    lacks: str = ""  # on this machine
    refuses: str = ""  # of any work
    never_automatic: str = ""

    def why_not(self, work: Work | None) -> str:
        return self.lacks if work is None else self.lacks or self.refuses


FAST = Able("fast", refuses="needs a GPU")
ALL = (FAST, Able("new", never_automatic="only where it is asked for"), Able("plain"), Able("slow"))


def test_auto_takes_the_first_that_works_and_says_why() -> None:
    assert choose(ALL, "auto", WORK).name == "plain"
    assert explain(ALL, "auto", WORK).splitlines() == [
        "fast: needs a GPU",
        "new: only where it is asked for",
        "plain: chosen",
        "slow: works, but comes later",
    ]


def test_one_that_is_named_is_taken() -> None:
    assert choose(ALL, "new", WORK).name == "new"
    assert explain(ALL, "slow", WORK).splitlines()[2:] == [
        "plain: works, but executor=slow was asked for",
        "slow: chosen",
    ]


@pytest.mark.parametrize(
    ("executors", "name", "message"),
    [
        (ALL, "fats", "executor=fats is unknown; choose one of auto, fast, new, plain, slow; did you mean fast?"),
        (ALL, "fast", "executor=fast: needs a GPU, or choose executor=plain or executor=slow"),
        ((FAST,), "auto", "executor=auto found none that can do this. fast: needs a GPU"),
        ((FAST,), "fast", "executor=fast: needs a GPU, or choose executor=auto"),
    ],
)
def test_what_cannot_be_is_one_line(executors: tuple[Able, ...], name: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        choose(executors, name, WORK)
    assert str(error.value) == message


def test_what_the_machine_lacks_is_said_before_any_work() -> None:
    executors = (Able("fast", lacks="no compiler was found"), Able("plain"))
    with pytest.raises(UserError, match="executor=fast: no compiler was found, or choose executor=plain"):
        check(executors, "fast")
    check(ALL, "fast")  # some work may be possible


def test_attentions_say_who_multiplies() -> None:
    x, elsewhere = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2, device="meta")
    no_tail = "tailed: multiplies layouts with a tail, and of softmax others whose buckets share no key"
    assert Bucketed(Window(3)).explain(x).splitlines()[:3] == [
        "native: chosen",
        no_tail,
        "blocks: works, but comes later",
    ]
    assert Bucketed(Window(3)).explain(elsewhere).splitlines()[:3] == [
        "native: runs on a CPU, the queries are on meta",
        no_tail,
        "blocks: chosen",
    ]
    assert Dense(executor="tiles").explain(x).splitlines()[::2] == [
        "native: works, but executor=tiles was asked for",
        "tiles: chosen",
    ]
    assert "scaled_dot_product_attention" in Dense(Normalizer(1.0)).explain(x)
    with pytest.raises(
        UserError, match="executor=native: runs on a CPU, the queries are on meta, or choose executor=tiles"
    ):
        Dense(executor="native").attend(elsewhere, elsewhere, elsewhere)


def test_triton_is_imported_only_where_it_is_chosen() -> None:
    code = """
import sys, torch
from sparsefinder.attention import Bucketed, Dense
from sparsefinder.patterns.window import Window
x = torch.zeros(1, 1, 4, 2)
for executor in ("native", "blocks"):
    Bucketed(Window(3), executor=executor)(x, x, x, torch.ones(1, 4) > 0, 0)
Bucketed(Window(3), executor="auto").explain(x)
for executor in ("native", "tiles", "auto"):
    Dense(executor=executor).attend(x, x, x)
sys.exit("sparsefinder.executors.triton.kernels" in sys.modules)
"""
    assert not subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode
