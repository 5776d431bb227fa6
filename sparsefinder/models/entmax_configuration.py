"""A configuration with ``attention_alpha`` attends with α-entmax, however its model is made, cast, copied, asked for or saved.

transformers keeps ``attention_alpha`` like any unknown setting, and forgets which attention goes with it: it takes
``attn_implementation`` out of a configuration while it loads, never writes it, and overrides it where another one is asked for.
Any of these would make softmax of an entmax model, without a word. So three members of its base class of configurations are
replaced, for configurations with ``attention_alpha`` and for no others:

- the attention that a model calls is always `REGISTERED`; where another one was asked for, that is said once;
- attention weights may be asked for: this attention has them;
- a configuration with an index beside its weights names the attention too, and has transformers' own until it is attached;
- whatever is written, a configuration alone or inside another one too, names the attention (`SAVED_AS`), so that a process
  that never imported ``sparsefinder`` ends in an error that says what to install, and not in softmax.

And a model class that never asks which attention to call is refused for such a configuration.

Like `sparsefinder.models.transformers_internals` this module uses what transformers does not promise to keep. It imports nothing
heavy: `follow_transformers` waits until somebody imports transformers, before or after ``sparsefinder``.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

MODELS = "transformers.modeling_utils"  # where transformers keeps the class of all models
REGISTERED = "sparsefinder"  # the name of the attention in both registries of transformers
SAVED_AS = "sparsefinder (entmax attention of the Python package sparsefinder: install it, then import sparsefinder)"
"""`attn_implementation` in config.json: the part of transformers' error that a reader without the package sees."""


ALPHA = "attention_alpha"
"""The α of all heads, a number, or a matrix ``L × H`` with one for each: see `sparsefinder.models.learned_heads`."""

TEMPERATURE = "attention_temperature"
"""What scores are multiplied with, ``{"delta": δ, "beta": L × H, "gamma": L × H}``: `sparsefinder.numerics.temperature`."""

PUBLISHED = "initial_alpha"
"""The α of SparseModernBERT's configurations, a number or one for each layer: of the global ones, sliding ones have softmax.
It counts where there is no ``attention_alpha``."""

INDEX = "sparsefinder_index"
"""Setting of a configuration beside whose weights an index lies (see `sparsefinder.sparse_model`); its value names the file."""

INDEXED_AS = "sparsefinder (sparse attention of the Python package sparsefinder: install it, then import sparsefinder)"
"""As `SAVED_AS`, in such a configuration."""


def remembers_entmax(settings: dict[str, Any]) -> bool:
    """Whether these settings are those of a model with α-entmax attention, or a temperature; α = 1 is softmax."""
    if TEMPERATURE in settings:
        return True
    alpha = settings.get(ALPHA, settings.get(PUBLISHED, 1.0))
    if isinstance(alpha, (list, tuple)):
        return any(each != 1.0 for each in alpha)
    return isinstance(alpha, bool) or alpha != 1.0


def _said(settings: dict[str, Any]) -> str:
    name = next(name for name in (ALPHA, PUBLISHED, TEMPERATURE) if name in settings)
    return f"{name}={settings[name]}" if isinstance(settings[name], (int, float)) else f"{name} in its configuration"


def follow_transformers(also: Mapping[str, Callable[[ModuleType], None]] | None = None) -> None:
    """Teach transformers, now where it is imported already, else as soon as it is; may be called again.

    Args:
        also: what else is to be done with a module of transformers, by its name, each once it is imported.
    """
    for name, teach in (also or {}).items():
        if teach not in _TAUGHT.setdefault(name, []):
            _TAUGHT[name].append(teach)
    if not any(isinstance(finder, _Follower) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Follower())
    for name in _TAUGHT:
        module = sys.modules.get(name)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            _teach(module)


def _teach(module: ModuleType) -> None:
    for teach in _TAUGHT[module.__name__]:
        teach(module)


class _Follower(importlib.abc.MetaPathFinder):
    """Finds nothing by itself: it lets `_TAUGHT` happen at the end of the import of what others find."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if name not in _TAUGHT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def then_teach(module: ModuleType) -> None:
            execute(module)
            _teach(module)

        spec.loader.exec_module = then_teach  # type: ignore[method-assign]
        return spec


def _teach_configurations(module: ModuleType) -> None:
    base = module.PreTrainedConfig
    if hasattr(base, "_remembers_entmax"):
        return
    base._remembers_entmax = True
    attention, weights = base._attn_implementation, base.output_attentions
    set_weights, validate, strip = weights.fset, base.validate_output_attentions, base._remove_keys_not_serialized

    def get_attention(config: Any) -> Any:
        asked = attention.fget(config)
        if not remembers_entmax(config.__dict__):
            return None if asked == INDEXED_AS else asked  # transformers' own, until the index is attached
        if asked not in (None, REGISTERED, SAVED_AS, INDEXED_AS):
            warnings.warn(
                f"attn_implementation={asked!r} would be softmax; this model attends with entmax "
                f"({_said(config.__dict__)}) and goes on with it, attention weights included. For softmax call "
                "sparsefinder.models.set_normalizer(model, Normalizer(1.0))",
                stacklevel=2,
            )
        config._attn_implementation_internal = REGISTERED
        return REGISTERED

    def ask_for_weights(config: Any, value: Any) -> None:
        if remembers_entmax(config.__dict__):
            config._output_attentions = value
        else:
            set_weights(config, value)

    @functools.wraps(validate)
    def validate_output_attentions(self: Any) -> None:
        if not remembers_entmax(self.__dict__):
            validate(self)

    @functools.wraps(strip)
    def strip_and_name(self: Any, settings: dict[str, Any]) -> None:
        strip(self, settings)  # which calls this for every configuration inside
        if remembers_entmax(settings):
            settings["attn_implementation"] = SAVED_AS
        elif INDEX in settings:
            settings["attn_implementation"] = INDEXED_AS

    base._attn_implementation = property(get_attention, attention.fset)
    base.output_attentions = property(weights.fget, ask_for_weights, doc=weights.__doc__)
    base._remove_keys_not_serialized = strip_and_name
    base.validate_output_attentions = validate_output_attentions
    for made in _with_subclasses(base):  # each class keeps a list of its validators
        checks: list[Any] = getattr(made, "__class_validators__", [])
        checks[:] = [validate_output_attentions if check is validate else check for check in checks]


def _teach_models(module: ModuleType) -> None:
    from sparsefinder.models.replacement.registered_function import attend

    masks = import_module("transformers.masking_utils")
    module.AttentionInterface.register(REGISTERED, attend)
    masks.AttentionMaskInterface.register(REGISTERED, _explicit(masks))
    base = module.PreTrainedModel
    if hasattr(base, "_remembers_entmax"):
        return
    base._remembers_entmax = True
    check = base.get_correct_attn_implementation

    @functools.wraps(check)
    def get_correct_attn_implementation(self: Any, requested_attention: Any, *args: Any, **kwargs: Any) -> Any:
        if requested_attention == REGISTERED and not self._can_set_attn_implementation():
            raise ValueError(
                f"{type(self).__name__} never calls another attention than its own, so it cannot attend with entmax; "
                "attention_alpha in its configuration asks for that: take it out, or choose another model"
            )
        return check(self, requested_attention, *args, **kwargs)

    base.get_correct_attn_implementation = get_correct_attn_implementation


def _explicit(masks: ModuleType) -> Callable[..., Any]:
    """The boolean mask of transformers' own `sdpa` attention, but never left out where it is causal, and no matrix ``N × N``,
    which would be the largest tensor of a long text, where it is one row for all queries ``(B, 1, 1, N)``, the window of a
    sliding layer (`sparsefinder.models.masks.band`) or the whole past of a decoder (`sparsefinder.models.masks.past`). A window
    that no layer has is not made: ModernBERT asks for one all the same, and nobody reads it."""

    @functools.wraps(masks.sdpa_mask)
    def explicit(*args: Any, **kwargs: Any) -> Any:
        torch = import_module("torch")
        kinds = getattr(kwargs.get("config"), "layer_types", None)
        if kinds and set(kinds) == {"full_attention"} and kwargs.get("local_size") is not None:
            return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=kwargs.get("device"))
        ours = import_module("sparsefinder.models.masks")
        window, tokens = _window_of(masks, kwargs.get("mask_function")), kwargs.get("kv_length", 0)
        rule = None
        if window is not None and tokens > ours.rows_of_band(*window):
            rule = functools.partial(ours.band, reach=window[0], causal=window[1])
        elif kwargs.get("mask_function") is masks.causal_mask_function and tokens > 2:
            rule = ours.past
        # a part of a text, with a cache, has its rows
        if rule is not None and kwargs.get("q_length") == tokens and not int(kwargs.get("q_offset", 0)):
            valid = masks.prepare_padding_mask(kwargs.get("attention_mask"), tokens, kwargs.get("kv_offset", 0))
            if valid is None:
                valid = torch.ones(kwargs["batch_size"], tokens, dtype=torch.bool, device=kwargs.get("device"))
            return rule(valid.bool())
        if kwargs.get("mask_function") is masks.bidirectional_mask_function and "q_length" in kwargs:
            kwargs["q_length"] = 1
        return masks.sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    return explicit


def _window_of(masks: ModuleType, function: Any) -> tuple[int, bool] | None:
    """How far a query sees, and whether into the past alone, by a mask function of transformers that is a sliding window and
    nothing besides; else None.

    It is one exactly where it has the code of such a window and what the code closes over is one too. A causal window counts
    the query itself; of itself alone none is left.
    """
    try:
        window, rest = function.__closure__[0].cell_contents
        (size,) = (cell.cell_contents for cell in window.__closure__)
        for causal, make in enumerate(
            (masks.sliding_window_bidirectional_mask_function, masks.sliding_window_causal_mask_function)
        ):
            alike = make(1)
            own, its_rest = alike.__closure__[0].cell_contents
            if (function.__code__, window.__code__, rest) == (alike.__code__, own.__code__, its_rest):
                reach = size - causal
                return (reach, bool(causal)) if isinstance(size, int) and reach >= causal else None
    except (AttributeError, TypeError, ValueError, IndexError):
        pass
    return None


def _with_subclasses(made: Any) -> Iterator[Any]:
    yield made
    for below in made.__subclasses__():
        yield from _with_subclasses(below)


_TAUGHT: dict[str, list[Callable[[ModuleType], None]]] = {
    "transformers.configuration_utils": [_teach_configurations],
    MODELS: [_teach_models],
}
