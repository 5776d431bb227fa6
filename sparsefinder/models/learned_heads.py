"""An α and a temperature for each head, learned with the weights and kept in the configuration.

α lies between its bounds; the temperature is `sparsefinder.numerics.temperature.scales`, with ``β`` and ``γ`` between theirs
and ``δ`` fixed, since a constant factor is what the projection of the queries learns anyway. All three are learned as they are,
and after every step those that left their bounds are set to them (projected gradient descent). Weight decay leaves them alone:
it would pull them to zero, which means nothing to an α.

While a model trains, each attention module has them as parameters (`learned_heads`), so that the optimizer, checkpoints and
copies know them. At the end they go into the configuration as numbers, where every way of loading and saving a model keeps them.

Source:
    α for each head: Correia, Niculae and Martins 2019, Adaptively Sparse Transformers, https://arxiv.org/abs/1909.00015. The
    temperature: Vasylenko et al. 2026, https://arxiv.org/abs/2506.16640; `sparsefinder.numerics.temperature` says what differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparsefinder.errors import UserError
from sparsefinder.models.dense_normalizer import configurations, get_normalizer
from sparsefinder.models.entmax_configuration import ALPHA, REGISTERED, TEMPERATURE
from sparsefinder.models.replacement.attention_calls import AttentionCall, attention_calls, check_model, is_sliding
from sparsefinder.models.replacement.each_head import LEARNED, HeadParameters


@dataclass(frozen=True, kw_only=True)
class PerHeadSettings:
    """What is learned for each head besides the weights, and between which bounds."""

    alpha: bool = False  # an α for each head, which begins at `alpha` of the model
    temperature: bool = (
        False  # a factor of the scores, delta + beta · log(1 + keys)^gamma, whose beta and gamma are learned
    )
    alpha_bounds: tuple[float, ...] = (1.05, 2.0)
    delta: float = 1.0  # of all heads, fixed
    beta: float = 0.0  # what every head begins with; 0 and delta=1 is the model without a temperature
    beta_bounds: tuple[float, ...] = (0.0, 2.0)
    gamma: float = 1.0  # what every head begins with
    gamma_bounds: tuple[float, ...] = (-2.0, 2.0)

    def __post_init__(self) -> None:
        for name in ("alpha_bounds", "beta_bounds", "gamma_bounds"):
            bounds = getattr(self, name)
            if len(bounds) != 2 or not bounds[0] <= bounds[1]:
                raise UserError(f"finetune.per_head.{name} must be [LOWEST, HIGHEST], got {list(bounds)}")
            object.__setattr__(self, name, tuple(map(float, bounds)))
        if not (self.alpha_bounds[0] > 1.0 and self.alpha_bounds[1] <= 2.0):
            raise UserError(
                f"finetune.per_head.alpha_bounds must lie above 1 (softmax, where α has no derivative) and at most at 2 "
                f"(sparsemax), got {list(self.alpha_bounds)}"
            )
        if self.beta_bounds[0] < 0.0 or not self.delta >= 0.0:
            raise UserError(
                f"finetune.per_head.beta_bounds and delta must not be negative, got {list(self.beta_bounds)} and {self.delta}: "
                "scores would change their sign"
            )
        for name in ("beta", "gamma"):
            low, high = getattr(self, f"{name}_bounds")
            if not low <= getattr(self, name) <= high:
                raise UserError(
                    f"finetune.per_head.{name}={getattr(self, name)} must lie within {name}_bounds={[low, high]}"
                )

    @property
    def any(self) -> bool:
        """Whether anything is learned."""
        return self.alpha or self.temperature


@dataclass(frozen=True)
class HeadValues:
    """What the heads of a model have of their own, each ``(L, H)`` floating point; None where they share it or have none.

    ``beta`` and ``gamma`` are of the temperature ``δ + β (log(1 + n))^γ``: both or neither.
    """

    alpha: Tensor | None = None
    beta: Tensor | None = None
    gamma: Tensor | None = None
    delta: float = 1.0


def get_heads(model: PreTrainedModel) -> HeadValues:
    """What the configuration of a model remembers for each head."""
    alpha, temperature = getattr(model.config, ALPHA, None), getattr(model.config, TEMPERATURE, None)
    values = HeadValues(torch.tensor(alpha)) if isinstance(alpha, (list, tuple)) else HeadValues()
    if temperature is None:
        return values
    beta, gamma = (torch.tensor(temperature[name]) for name in ("beta", "gamma"))
    return replace(values, beta=beta, gamma=gamma, delta=float(temperature["delta"]))


def set_heads(model: PreTrainedModel, values: HeadValues) -> None:
    """An α and a temperature for each head from now on, kept by ``save_pretrained``; what is None stays as it is.

    Args:
        model: changed in place.
        values: each ``(L, H)``, ``L`` all layers of the model.

    Raises:
        UserError: for a model whose layers do not have an attention each, and for values of another shape or range.
    """
    calls = _layers(model)
    _check(values, (len(calls), calls[0].heads))
    model.set_attn_implementation(REGISTERED)
    for config in configurations(model):
        if values.alpha is not None:
            setattr(config, ALPHA, values.alpha.tolist())
        if values.beta is not None and values.gamma is not None:
            kept = {"delta": values.delta, "beta": values.beta.tolist(), "gamma": values.gamma.tolist()}
            setattr(config, TEMPERATURE, kept)


def refuse_heads(settings: Mapping[str, Any], target: str) -> None:
    """A `UserError` where these settings of a configuration have something for each head, which ``target`` has no place for."""
    own = [name for name in (TEMPERATURE, ALPHA) if name in settings]
    if own and (own[0] == TEMPERATURE or isinstance(settings[ALPHA], (list, tuple))):
        raise UserError(
            f"the source has {own[0]} for each head in its configuration, and {target} has no place for it: convert a model "
            "that was finetuned without finetune.per_head"
        )


def check_heads(model: PreTrainedModel, label: str) -> None:
    """Refuse a model whose configuration was written by hand, or damaged; a `UserError` that begins with ``label``."""
    try:
        values = get_heads(model)
        if values != HeadValues():
            calls = _layers(model)
            _check(values, (len(calls), calls[0].heads))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{label}: {ALPHA} or {TEMPERATURE} in its config.json is wrong ({type(error).__name__}: {error}): one row for each "
            "layer and one number for each head are needed"
        ) from error


@contextlib.contextmanager
def learned_heads(model: PreTrainedModel, settings: PerHeadSettings) -> Iterator[None]:
    """Within the block each attention module of a model has its heads' α and temperature as parameters; at its end they are set.

    They begin with what the configuration has for each head, else with the α of all heads and the settings' temperature.

    Args:
        model: changed in place.
        settings: what is learned; with nothing, nothing is done.

    Raises:
        UserError: for a model whose layers do not have an attention each, or an α outside of its bounds.
    """
    if not settings.any:
        yield
        return
    calls = _layers(model)
    begin = _begin(model, settings, (len(calls), calls[0].heads))
    set_heads(model, begin)
    for index, call in enumerate(calls):
        alpha, beta, gamma = (None if x is None else x[index] for x in (begin.alpha, begin.beta, begin.gamma))
        call.module.add_module(LEARNED, HeadParameters(alpha, beta, gamma, begin.delta).to(model.device))
    try:
        yield
    finally:
        keep_bounds(model, settings)
        layers = [call.module._modules[LEARNED] for call in calls]
        alpha, beta, gamma = (_stacked([getattr(each, name) for each in layers]) for name in ("alpha", "beta", "gamma"))
        for call in calls:
            delattr(call.module, LEARNED)
        set_heads(model, HeadValues(alpha, beta, gamma, begin.delta))


@torch.no_grad()
def keep_bounds(model: nn.Module, settings: PerHeadSettings) -> None:
    """Set what left its bounds to them, within a block of `learned_heads`: after every step of an optimizer."""
    for module in model.modules():
        if isinstance(module, HeadParameters):
            for name, parameter in module.named_parameters():
                parameter.clamp_(*getattr(settings, f"{name}_bounds"))


class Bounded(TrainerCallback):
    """`keep_bounds` after each step of the Trainer."""

    def __init__(self, settings: PerHeadSettings):
        self.settings = settings

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer when the optimizer has made its step."""
        keep_bounds(kwargs["model"], self.settings)


def _layers(model: PreTrainedModel) -> list[AttentionCall]:
    """The calls of a model each of whose layers has one attention, which sees everything."""
    check_model(model.config, label := model.name_or_path or type(model).__name__)
    calls = attention_calls(model)
    numbers = [getattr(call.module, "layer_idx", None) for call in calls]
    alike = len({(call.which, call.heads) for call in calls}) == 1
    if not alike or numbers != list(range(len(calls))) or any(is_sliding(call.module, model.config) for call in calls):
        raise UserError(
            f"{label} is a {model.config.model_type}, whose layers do not have one attention each that sees everything, so there "
            "is no α and no temperature for each head: choose a model of the family bert, roberta, gpt2, llama or their kin"
        )
    return calls


def _begin(model: PreTrainedModel, settings: PerHeadSettings, shape: tuple[int, int]) -> HeadValues:
    kept = get_heads(model)
    values = HeadValues(delta=settings.delta)
    if settings.alpha:
        alpha = torch.full(shape, get_normalizer(model).alpha) if kept.alpha is None else kept.alpha
        low, high = settings.alpha_bounds
        if not bool(((low <= alpha) & (alpha <= high)).all()):
            raise UserError(
                f"finetune.alpha={alpha.flatten().tolist()[0]:g} lies outside of "
                f"finetune.per_head.alpha_bounds={[low, high]}"
            )
        values = replace(values, alpha=alpha)
    if settings.temperature:
        beta, gamma = (torch.full(shape, getattr(settings, name)) for name in ("beta", "gamma"))
        values = replace(values, beta=beta, gamma=gamma)
        if kept.beta is not None:
            values = replace(values, beta=kept.beta, gamma=kept.gamma, delta=kept.delta)
    return values


def _check(values: HeadValues, shape: tuple[int, int]) -> None:
    for name in ("alpha", "beta", "gamma"):
        value = getattr(values, name)
        if value is not None and (value.shape != shape or not bool(value.isfinite().all())):
            raise ValueError(f"{name} must be finite and {shape}, layers × heads, got {tuple(value.shape)}")
    if values.alpha is not None and not bool(((values.alpha > 1.0) & (values.alpha <= 2.0)).all()):
        raise ValueError(f"alpha of a head must lie above 1 and at most at 2, got {values.alpha.flatten().tolist()}")
    if (values.beta is None) != (values.gamma is None):
        raise ValueError("a temperature needs beta and gamma")


def _stacked(rows: list[Tensor | None]) -> Tensor | None:
    found = [row.detach().float().cpu() for row in rows if row is not None]
    return torch.stack(found) if found else None
