"""Shared fixtures: small random queries and keys (those of `sparsefinder.testing`), the published reference files, and
offline mode for everything."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before any import of transformers: nothing is downloaded at test time
if (
    "PYTEST_XDIST_WORKER" in os.environ
):  # before any import of torch: a core each, threads of several would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# what is raced on a busy machine is no answer to keep for this user
os.environ["SPARSEFINDER_CROSSOVERS"] = str(Path(tempfile.gettempdir(), f"crossovers-{os.getpid()}.json"))

import pytest
import torch

if not torch.cuda.is_available():
    # before any import of triton, which newer versions of torch import themselves: its kernels run interpreted, on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from sparsefinder.testing import random_qk, single_sentence
from tests.nursery import Nursery, nursery

__all__ = ["GRAPH", "ROOT", "graph_files", "random_qk", "single_sentence"]

ROOT = Path(__file__).resolve().parent.parent
GRAPH = Path(__file__).resolve().parent / "data" / "graph"


@pytest.fixture(autouse=True)
def log_as_before() -> Iterator[None]:
    """What Hydra or a command sets up for its log goes with the test: it writes to a stream that is closed after it."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.setLevel(level)
    for handler in logging.root.handlers[:]:
        if handler not in handlers:
            logging.root.removeHandler(handler)


@pytest.fixture(scope="session")
def runs() -> Iterator[Nursery]:
    """Starts runs of the command line, without the seconds that importing takes."""
    with nursery() as started:
        yield started


@pytest.fixture
def graph_files() -> Path:
    """Queries, keys, projections, centroids and metrics made with the published Sparsefinder."""
    return GRAPH
