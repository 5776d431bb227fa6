"""The border between Python and the C++ of `sparsefinder.executors.native`: structures, exceptions, and clean compiling."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest
import torch

from sparsefinder.errors import UserError
from sparsefinder.executors.native import (
    bucketed,
    build,
    dense,
    gold_pairs,
    library,
    nearest_centroids,
    predictors,
    tailed,
)
from sparsefinder.executors.native.library import Library
from sparsefinder.graphs import QK, Buckets, Layout

NATIVE = Path(build.__file__).parent
SOURCES = sorted(path.stem for path in NATIVE.glob("*.cpp"))
MODULES = (bucketed, dense, gold_pairs, nearest_centroids, predictors, tailed)
LIBRARIES = {module._LIBRARY.name: module._LIBRARY for module in MODULES}


def compiled(*arguments: str) -> None:
    try:
        compiler = build.compiler()
    except UserError as error:
        pytest.skip(str(error))
    done = subprocess.run([compiler, "-std=c++17", "-fopenmp", *arguments], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[:3000]


@pytest.mark.parametrize("name", SOURCES)
def test_it_compiles_without_a_warning(name: str) -> None:
    compiled("-Wall", "-Wextra", "-Werror", "-fsyntax-only", str(NATIVE / f"{name}.cpp"))


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_is_what_python_takes_it_for(name: str) -> None:
    assert library.missing(LIBRARIES[name]) == ""


class _Longer(ctypes.Structure):
    _fields_ = [*dense._Problem._fields_, ("new", ctypes.c_int64)]


@pytest.mark.parametrize(
    "other", [Library("dense", 2, (dense._Problem,)), Library("dense", 1, (_Longer,)), Library("dense", 1)]
)
def test_another_version_or_structure_is_refused_before_anything_is_read(other: Library) -> None:
    with pytest.raises(UserError, match=r"dense\.cpp and the Python that calls it are of different versions"):
        other.call("forward_float32")
    assert "install sparsefinder again" in library.missing(other)


@pytest.mark.skipif(
    "SPARSEFINDER_SANITIZE" in os.environ, reason="the sanitizer's own new ends the process instead of throwing"
)
def test_memory_that_runs_out_is_a_python_error() -> None:
    """In a parallel region, and outside; the process goes on."""
    ids = torch.zeros(1, 1, 4, 1, dtype=torch.int64)
    qk = QK(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.ones(1, 4) > 0)
    with pytest.raises(MemoryError, match=r"bucketed\.cpp ran out of memory in forward_float32: give it fewer tokens"):
        bucketed.attend(qk, qk.k, Layout(Buckets(ids, ids, 1 << 60)), 1.5)
    assert bucketed.attend(qk, qk.k, Layout(Buckets(ids, ids, 1)), 1.5).shape == (1, 1, 4, 2)
    with pytest.raises(MemoryError, match=r"predictors\.cpp ran out of memory in nearest_float32"):
        predictors.nearest(torch.zeros(1, 1, 3, 0), torch.zeros(1, 1, 1 << 58, 0), 1)


# calls that allocate, one after the other; the last of the arrays of allocation_failures.cpp are written
CALLS = {
    "bucketed": """[] {
        Graph g{1, 2, 1, N, N, D, 1, 1, 4, 2, 2, 0, THREADS, ids, ids, valid, valid, none, 1.5};
        return until_it_works("forward", [&] { return forward_float32(&g, x, y, z, a); }) ||
               until_it_works("backward", [&] { return backward_float32(&g, x, y, z, x, a, b, c); }) ||
               until_it_works("count", [&] { return count(&g, counts); });
    }()""",
    "dense": """[] {
        Problem p{1, 2, 2, N, N, D, N, N, 0, 0, 0, THREADS, 0, 0, valid, valid, nullptr, alphas, 0.4, 0.0};
        return until_it_works("forward", [&] { return forward_float32(&p, x, y, z, a, peaks, thresholds); }) ||
               until_it_works("backward", [&] {
                   return backward_float32(&p, x, y, z, x, peaks, thresholds, a, b, c, slopes);
               }) ||
               until_it_works("support", [&] {
                   Support<float> *pairs = nullptr;
                   const int status = support_float32(&p, x, y, counts, &pairs);
                   release_float32(pairs);
                   return status;
               });
    }()""",
    "gold_pairs": """[] {
        Hinge h{2, N, D, 2, 0, THREADS, 1.0, ids, ids, ids, slopes};
        return until_it_works("hinge", [&] { double loss; return hinge_float32(&h, x, y, a, b, &loss); });
    }()""",
    "nearest_centroids": """[] {
        Problem p{1, 2, N, D, 2, 4, THREADS}, flat{1, 2, N, D, 0, 4, THREADS};
        const Rows<const float> in{x, 2 * N * D, N * D, D};
        return until_it_works("tree", [&] { return nearest_float32(&p, &in, y, z, y, z, ids); }) ||
               until_it_works("flat", [&] { return nearest_float32(&flat, &in, y, z, y, z, ids); });
    }()""",
    "predictors": """[] {
        const double levels[2]{0.5, 0.1};
        Choice rule{2, 2, N, 4, 2, 1, THREADS, levels, 1.5}, other{2, 2, N, 4, 0, 0, THREADS, levels, 1.5};
        const auto routed = [](const Choice &by) {
            Kept *kept = nullptr;
            const int status = route_float32(&by, D, x, z, y, y, z, y, y, few, &kept);
            release(kept);
            return status;
        };
        return until_it_works("nearest", [&] { return nearest_float32(1, 2, N, D, 1, 4, 2, THREADS, x, y, ids); }) ||
               until_it_works("budget", [&] { return routed(rule); }) ||
               until_it_works("margin", [&] { return routed(other); }) ||
               until_it_works("causal", [&] {
                   Kept *kept = nullptr;
                   const int status = route_causal_float32(&rule, D, x, y, ids, few, &kept);
                   release(kept);
                   return status;
               });
    }()""",
    "tailed": """[] {
        const auto problem = [](int64_t causal, double alpha) {
            return Problem{1, 2, 1, N, N, D, 1, 4, THREADS, 1, 1, causal, ids, ids, valid, valid, nullptr, nullptr, alpha};
        };
        const Rows<const float> in{x, 2 * N * D, N * D, D}, keys{y, 2 * N * D, N * D, D}, values{z, 2 * N * D, N * D, D};
        const Rows<float> out{a, 2 * N * D, N * D, D}, other{b, 2 * N * D, N * D, D};
        const auto both = [&](const Problem &of) {
            return until_it_works("forward", [&] { return forward_float32(&of, &in, &keys, &values, &out, c); }) ||
                   until_it_works("backward", [&] {
                       return backward_float32(&of, &in, &keys, &values, &in, &in, &out, &other, &other, c);
                   });
        };
        return both(problem(0, 1.0)) || both(problem(0, 1.5)) || both(problem(1, 1.0)) || both(problem(1, 1.5));
    }()""",
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_allocation_may_fail(name: str, tmp_path: Path) -> None:
    """Each in its turn: no exception leaves a function or a parallel region, and nothing is left behind."""
    program = tmp_path / name
    calls = " ".join(CALLS[name].split())
    source = str(Path(__file__).with_name("allocation_failures.cpp"))
    compiled(f'-DSOURCE="{NATIVE / f"{name}.cpp"}"', f"-DCALLS={calls}", source, "-o", str(program))
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # two threads on a busy machine need not spin
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert not done.returncode, f"{done.stdout}{done.stderr}"
