"""Names of classes that files of earlier versions hold, and where these classes are now.

A manifest, a record of a table and a configuration file of somebody's own name classes in full. When such a class moves, what was
measured with it is still what it was, and is neither measured again nor refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOVED = {
    "sparsefinder.auto.Auto": "sparsefinder.auto_attention.Auto",
    "sparsefinder.executors.lsg.attention.LSGAttention": "sparsefinder.executors.local_sparse_global.attention.LSGAttention",
}
"""Full name then → full name now."""


def with_names_of_today(value: Any) -> Any:
    """What JSON holds, with the name of today for each text in it that is one of an earlier version."""
    if isinstance(value, Mapping):
        return {key: with_names_of_today(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_names_of_today(item) for item in value]
    return MOVED.get(value, value) if isinstance(value, str) else value
