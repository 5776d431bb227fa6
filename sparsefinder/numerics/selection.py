"""Which columns of a matrix of scores to keep, where a column stands for one key or for several.

The scores are estimates, ``s_im ≈ q_i·k_j / √D`` for the ``n_m`` keys ``j`` behind column ``m``: keys themselves (``n = 1``) or
clusters of keys. Two rules say what a query takes:

- ``margin``: entmax of the estimates has a threshold ``τ_i``, the number with ``Σ_m n_m [(α − 1) s_im − τ_i]₊^{1/(α−1)} = 1``;
  a column is kept iff ``(α − 1) s_im ≥ τ_i − level``. The support of entmax is what lies above the true threshold, so at
  ``level = 0`` this is the estimated support, and a larger level forgives larger errors of the estimates (a negative one asks
  for certainty). A query that looks at many keys gets many, one that looks at few gets few.
- ``budget``: the columns of largest score, until they stand for a share ``level`` of the query's allowed keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefinder.errors import UserError
from sparsefinder.numerics.entmax_newton import STEPS, compiled, newton_step

RULES = ("margin", "budget")
_LOOKS = 32  # times that `STEPS` Newton steps are taken while some threshold moves; then rows are given up
_STILL = 3e-7  # a step of τ that is rounding noise in float32


def check_rule(rule: str, level: float, alpha: float) -> None:
    """Refuse a rule that does not exist, or a level that it cannot have.

    Args:
        rule: ``margin`` or ``budget``.
        level: Distance below the threshold (margin), or share of the keys (budget).
        alpha: Of the entmax whose threshold is estimated.

    Raises:
        UserError: With the choices there are.
    """
    if rule not in RULES:
        raise UserError(f"rule={rule} is unknown; choose one of {', '.join(RULES)}")
    if rule == "budget" and not 0 < level <= 1:
        raise UserError(f"with rule=budget the level is a share of the keys, above 0 and at most 1, got {level}")
    if rule == "margin" and not 1 < alpha <= 2:
        raise UserError(f"alpha must be greater than 1 and at most 2, got {alpha}: softmax has no threshold")


def select(scores: Tensor, numbers: Tensor, rule: str, level: float | Tensor, alpha: float) -> Tensor:
    """The columns kept by each row.

    Args:
        scores: ``(..., rows, M)`` floating point.
        numbers: Keys behind each column, broadcastable to the scores; a column of no key is never kept.
        rule: ``margin`` or ``budget``, see above.
        level: Distance below the threshold (margin), or share of the keys (budget); a tensor that broadcasts to
            ``(..., rows, 1)`` says it for each row or each head.
        alpha: Of the entmax whose threshold is estimated, 1 < α ≤ 2.

    Returns:
        ``(..., rows, M)`` bool.
    """
    empty = numbers == 0
    if bool(empty.any()):
        scores = scores.masked_fill(empty, -torch.inf)
    if rule == "margin":
        scaled = (alpha - 1) * scores
        return (scaled >= thresholds(scaled, numbers, alpha) - level) & (numbers > 0)
    order = scores.topk(_most_columns(numbers, level), dim=-1).indices
    ordered = numbers.expand(scores.shape).gather(-1, order)
    # a column is kept where that brings the row nearer to its budget than stopping before it; the first one always is
    before = ordered.cumsum(-1) - ordered
    kept = before + ordered / 2 <= level * numbers.sum(-1, keepdim=True)
    kept[..., :1] = True
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, kept) & (numbers > 0)


def _most_columns(numbers: Tensor, level: float | Tensor) -> int:
    """Columns that a budget can reach: as many as its smallest ones fit, so that no row needs to be sorted whole."""
    smallest = numbers.masked_fill(numbers == 0, torch.inf).sort(dim=-1).values
    before = (smallest.cumsum(-1) - smallest).nan_to_num(torch.inf)
    fitting = before + smallest / 2 <= level * numbers.sum(-1, keepdim=True)
    return max(1, int(fitting.sum(-1).max()))


def thresholds(scaled: Tensor, numbers: Tensor, alpha: float, least: float = 1.0) -> Tensor:
    """Thresholds of entmax where each column stands for several equal scores.

    Newton's method on ``‖[x − τ]₊‖_p − 1`` with ``p = 1/(α − 1)``, from the left: see `sparsefinder.numerics.entmax_newton`,
    here with a weight for each column.

    Args:
        scaled: ``(α − 1) s``, ``(..., rows, M)``, ``-inf`` where a column is absent.
        numbers: Equal copies of each column, broadcastable to it.
        alpha: 1 < α ≤ 2.
        least: No column that is there stands for fewer; ``τ ≥ max x − least^{1−α}`` is where the steps start.

    Returns:
        ``τ (..., rows, 1)``; ``-inf`` in a row without any key.
    """
    peak = scaled.amax(-1, keepdim=True)
    if scaled.numel() == 0:
        return peak
    height = torch.full_like(peak, least ** (1 - alpha))  # max x − τ
    for _ in range(_LOOKS):
        before, height = height, compiled(_newton, alpha)(scaled, numbers, height)
        if not bool((before - height > _STILL).any()):
            break
    return peak - height


def _newton(scaled: Tensor, numbers: Tensor, height: Tensor, alpha: float) -> Tensor:
    """Some steps of all rows; the row is shifted, not its threshold, so that a compiled form stays in the cache."""
    peak = scaled.amax(-1, keepdim=True)
    x = scaled - torch.where(peak == -torch.inf, 0.0, peak) + height
    for _ in range(STEPS):
        above = x.clamp_min(0.0)
        one_less = (above > 0).to(x.dtype) if alpha == 2.0 else above ** ((2 - alpha) / (alpha - 1)) * (above > 0)
        slope = (numbers * one_less).sum(-1, keepdim=True)
        total = (numbers * one_less * above).sum(-1, keepdim=True)
        x = x - newton_step(total, slope, alpha)
    return torch.where(peak == -torch.inf, height, x.amax(-1, keepdim=True))
