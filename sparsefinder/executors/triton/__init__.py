"""The predicted graph on a GPU: a plan of blocks, and Triton kernels that walk through it.

Nothing here imports Triton but `block_sparse`, and that is imported at the first call: the package works without it.
"""
