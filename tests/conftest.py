"""Shared fixtures: small random queries and keys, the published reference files, and offline mode for everything."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of transformers: nothing is downloaded at test time

import pytest
import torch

from sparsefinder.graphs import QK

ROOT = Path(__file__).resolve().parent.parent
GRAPH = Path(__file__).resolve().parent / "data" / "graph"


@pytest.fixture
def graph_files() -> Path:
    """Queries, keys, projections, centroids and metrics made with the published Sparsefinder."""
    return GRAPH


def random_qk(
    lengths: list[int], heads: int = 2, size: int = 8, causal: bool = False, seed: int = 0, padding: float = 7.0
) -> QK:
    """Random queries and keys of sentences padded on the right; padded positions hold ``padding``."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    q, k = torch.randn(2, len(lengths), heads, longest, size, generator=generator)
    padded = ~valid[:, None, :, None]
    return QK(q.masked_fill(padded, padding), k.masked_fill(padded, padding), valid, causal)


def alone(qk: QK, index: int) -> QK:
    """One sentence of a batch without its padding."""
    tokens = int(qk.lengths[index])
    part = slice(index, index + 1)
    return QK(qk.q[part, :, :tokens], qk.k[part, :, :tokens], qk.valid[part, :tokens], qk.causal)
