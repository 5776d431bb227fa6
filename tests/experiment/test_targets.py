"""What a target asks of a head, and how a density is spread over all of them."""

from __future__ import annotations

import itertools

import pytest
import torch

from sparsefinder.errors import UserError
from sparsefinder.experiment.targets import Measured, Target, spread


class TestTarget:
    def test_words(self) -> None:
        assert Target.parse("density=0.1") == Target("density", 0.1)
        assert Target.parse("recall=0.95") == Target("recall", 0.95)
        assert Target.parse("density_total=0.1") == Target("density_total", 0.1)
        assert Target.parse("loss=0.01") == Target("loss", 0.01)
        for wrong in ("density", "density=2", "density=0", "recall=much", "0.1", "precision=0.5"):
            with pytest.raises(UserError, match="density=D or recall=R"):
                Target.parse(wrong)

    def test_a_density_takes_the_nearest_value(self) -> None:
        curve = {1: (0.05, 0.3), 2: (0.11, 0.5), 3: (0.3, 0.9)}
        assert Target("density", 0.1).choose(curve) == 2
        assert Target("density", 0.9).choose(curve) == 3

    def test_a_recall_takes_the_sparsest_value_that_reaches_it(self) -> None:
        curve = {1: (0.05, 0.3), 2: (0.11, 0.92), 3: (0.3, 0.97)}
        assert Target("recall", 0.9).choose(curve) == 2
        assert Target("recall", 0.99).choose(curve) == 3

    @pytest.mark.parametrize("goal", [0.013, 0.1, 0.5, 0.77])
    def test_values_between_come_near_to_a_density(self, goal: float) -> None:
        """A sparsity parameter whose density is its cube: a few looks find the cube root."""
        target, curve = Target("density", goal), {value: (value**3, value) for value in (0.1, 0.5, 1.0)}
        for _ in range(12):
            value = target.between(curve, whole=False)
            assert value is not None
            curve[value] = (value**3, value)
        assert abs(curve[target.choose(curve)][0] - goal) < 0.02 * goal

    def test_whole_numbers_end_at_neighbours(self) -> None:
        target, curve = Target("density", 0.1), {value: (value / 100, 0.5) for value in (1, 64)}
        tried = []
        while (value := target.between(curve, whole=True)) is not None:
            curve[value] = (value / 100 + 0.001, 0.5)
            tried.append(value)
        assert target.choose(curve) in (9, 10)
        assert len(tried) == len(set(tried))

    def test_beyond_the_sweep_there_is_nothing_to_try(self) -> None:
        assert Target("density", 0.5).between({1: (0.1, 0.2), 2: (0.2, 0.3)}, whole=False) is None

    def test_curves_of_all_heads_are_refined_where_they_are_known_least(self) -> None:
        curve = {0.0: (0.0, 0.0, 0.1), 1.0: (0.1, 0.0, 0.9), 2.0: (0.9, 0.0, 0.95), 3.0: (1.0, 0.0, 0.95)}
        assert Target("loss", 0.01).between(curve, whole=False) == 0.5
        flat = {1: (0.1, 0.0, 0.2), 2: (0.9, 0.0, 0.4)}
        assert Target("density_total", 0.5).between(flat, whole=True) is None


def test_no_other_choice_at_that_density_keeps_more() -> None:
    """Against all choices there are, for curves that are concave, bent the other way and not even rising."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        density = torch.rand(3, 5, generator=generator).sort(-1).values.tolist()
        mass = torch.rand(3, 5, generator=generator).tolist()
        curves = {
            head: {value: Measured(d, 0.0, m) for value, (d, m) in enumerate(zip(*both, strict=True))}
            for head, both in enumerate(zip(density, mass, strict=True))
        }
        for goal in (0.2, 0.5, 0.8):
            chosen = [curves[head][value] for head, value in spread(curves, goal).items()]
            total, kept = (sum(getattr(each, name) for each in chosen) for name in ("density", "mass"))
            for others in itertools.product(*(curve.values() for curve in curves.values())):
                more = sum(other.mass for other in others)
                assert more <= kept + 1e-9 or sum(other.density for other in others) > total - 1e-9 or goal * 3 < total


def test_a_density_is_reached_as_nearly_as_steps_allow() -> None:
    curves = {
        head: {v / 100: Measured(v / 100, 0.0, (v / 100) ** (1 / (2 + head))) for v in range(101)} for head in range(4)
    }
    for goal in (0.05, 0.3, 0.9):
        chosen = spread(curves, goal)
        assert abs(sum(chosen.values()) / 4 - goal) < 0.005
    low = spread(curves, 0.05)
    assert min(low.values()) > 0
    assert spread(curves, 0.0) == dict.fromkeys(range(4), 0.0)
