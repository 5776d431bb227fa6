"""Which family of methods a pattern of conf/pattern belongs to: for headings, colours and comparisons, never for results."""

from __future__ import annotations

UPPER_BOUND, CHANCE, EVERYTHING = "oracle", "random", "full"  # patterns that others are read against
TOP_K = "oracle_topk"  # the true scores with a budget for each query

OURS, PUBLISHED, FIXED, DEPENDENT, BOUNDS = (
    "ours",
    "published Sparsefinder",
    "fixed patterns",
    "other data-dependent patterns",
    "bounds",
)
FAMILIES = (OURS, PUBLISHED, FIXED, DEPENDENT)  # in the order of the figures; bounds are drawn in all of them
ALL_OTHERS = (PUBLISHED, FIXED, DEPENDENT)

_BEGINNINGS = {  # of the names of their files; whatever is not here depends on the data
    BOUNDS: (UPPER_BOUND, CHANCE, EVERYTHING),
    OURS: ("routed", "refined", "lowrank", "bilinear"),
    PUBLISHED: ("kmeans", "quantize", "distance", "dotproduct_entmax"),
    FIXED: (
        *("window", "longformer", "bigbird", "openai", "dilated", "block_local", "sinks"),
        *("lsg", "global", "strided", "fixed"),
    ),
}


def family_of(pattern: str) -> str:
    """The family of a pattern, by the beginning of its name."""
    for family, beginnings in _BEGINNINGS.items():
        if pattern.startswith(beginnings):
            return family
    return DEPENDENT
