"""Triton's kernels compile for a GPU, without one: its interpreter accepts more than its compiler does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# one process for all: it starts torch and triton once
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sparsefinder.executors.triton import dense_kernels, kernels

def compile_kernels(module, names, constants, types):
    for name in names:
        kernel = getattr(module, f"{name}_kernel")
        signature = {x: "constexpr" if x in constants else types.get(x, "*fp32") for x in kernel.arg_names}
        used = {x: constants[x] for x in kernel.arg_names if x in constants}
        made = triton.compile(ASTSource(kernel, signature, used), target=GPUTarget("cuda", 90, 32))
        assert made.asm["ptx"], name

constants = dict(ALPHA=1.5, GAIN=0.5, Q_SLOTS=2, K_SLOTS=1, CAUSAL=True, SIZE=64, WIDTH=64, BLOCK=32)
types = dict(scale="fp32", **{f"{x}_ptr": "*bf16" for x in "qkvg"})
types |= {f"{x}_ptr": "*i32" for x in ("q_order", "k_order", "blocks", "q_ids", "k_ids")}
compile_kernels(kernels, ("peaks", "sums", "output", "deltas", "dq", "dkv"), constants, types)

for alpha, vector in ((1.5, "*bf16"), (0.0, "*fp32")):
    constants = dict(CONSTANT=alpha, HEADS=4, GROUP=2, SIZE=64, WIDTH=64, BLOCK=32, STILL=2e-7, MOST=64)
    types = dict(scale="fp32", **{x: "i32" for x in ("queries", "keys", "back", "ahead")})
    types |= {f"{x}_ptr": vector for x in ("q", "k", "v", "g", "out", "dq", "dk", "dv")}
    types |= {f"{x}_valid_ptr": "*i8" for x in "qk"}
    compile_kernels(dense_kernels, ("forward", "dq", "dkv"), constants, types)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_compile_for_a_gpu_without_one() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
