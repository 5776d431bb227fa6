"""Predict which keys each query of a transformer will attend to, before any score is computed.

    index = sparsefinder.fit(model, tokenizer, texts)
    sparsefinder.attach(model, index, density=0.1)

Importing it teaches transformers, before or after that is imported itself, what a model with entmax attention is, and to attach
the index that lies beside a model's weights. What is offered here is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsefinder.models.entmax_configuration import MODELS, follow_transformers
from sparsefinder.sparse_model import __all__ as _OFFERED
from sparsefinder.sparse_model.checkpoints import teach, teach_sentence_transformers

if TYPE_CHECKING:
    from sparsefinder.sparse_model import Index, attach, detach, explain, fit, load

__version__ = "0.1.0"
__all__ = ["Index", "attach", "detach", "explain", "fit", "load"]

follow_transformers({MODELS: teach, "sentence_transformers": teach_sentence_transformers})


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparsefinder import sparse_model

    return getattr(sparse_model, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OFFERED})
