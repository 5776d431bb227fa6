"""The front door: learn what predicts a model's attention, attach it, keep it, load it.

Names are looked up when they are asked for: `sparsefinder` offers them too, and must stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsefinder.sparse_model.attaching import attach, detach
    from sparsefinder.sparse_model.explaining import explain
    from sparsefinder.sparse_model.fitting import fit
    from sparsefinder.sparse_model.index import Index
    from sparsefinder.sparse_model.loading import load

__all__ = ["Index", "attach", "detach", "explain", "fit", "load"]

_WHERE = {
    "Index": "index",
    "attach": "attaching",
    "detach": "attaching",
    "explain": "explaining",
    "fit": "fitting",
    "load": "loading",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
