"""Attention on a GPU in Triton: of a predicted graph, by a plan of blocks and kernels that walk through it; and dense.

Nothing here imports Triton but `block_sparse` and the kernels, which are imported at the first call: the package works
without it.
"""
