"""The numbers that define LSG attention, and the checks on them; one place for the attention and for the model configs."""

from __future__ import annotations

from dataclasses import dataclass

from sparsefinder.errors import UserError

SPARSITY_TYPES = ("norm", "pooling", "lsh", "stride", "block_stride", "bos_pooling", "none")
"""Ways of picking the sparse keys; None means the same as "none"."""

POOLED = ("pooling", "lsh", "bos_pooling")
"""Types whose sparse keys are mixtures of tokens, so that no graph between tokens exists."""

MAX_GLOBAL_TOKENS = 512
"""Rows of the table of learned global tokens, in every published checkpoint."""


@dataclass(frozen=True)
class LSGSettings:
    """Settings of LSG attention, checked when made.

    Raises:
        UserError: for an unknown type, sizes that do not divide as the block layout needs, and counts out of range.
    """

    sparsity_type: str | None = "norm"
    """How sparse keys are picked, one of `SPARSITY_TYPES`."""
    block_size: int = 128
    """Tokens of a block; a query sees its own block and both neighbours (the one before, when causal)."""
    sparse_block_size: int = 128
    """Sparse keys on each side, next to the three local blocks; 0 for none."""
    sparsity_factor: int = 2
    """One sparse key stands for this many tokens."""
    num_global_tokens: int = 1
    """Tokens at the front that see all and are seen by all."""
    mask_first_token: bool = False
    """Hide the first token after the global ones from every query (it repeats the first global token)."""
    lsh_num_pre_rounds: int = 1
    """Rounds of merging similar keys before the clusters of `lsh` are made."""
    padding_in_pools: bool = False
    """Only for `bos_pooling`: keep groups of nothing but padding in view, which the published models do by an overflow.

    Their mask adds up `-3.4e38` to `-inf`, which is then not recognised as masked. Outputs depend on padding then.
    """
    seed: int = 123
    """Seed of the random projections of `lsh`, together with layer and head."""

    def __post_init__(self) -> None:
        if self.sparsity_type is None:
            object.__setattr__(self, "sparsity_type", "none")
        if self.sparsity_type not in SPARSITY_TYPES:
            raise UserError(f"unknown sparsity_type {self.sparsity_type!r}; choose one of {', '.join(SPARSITY_TYPES)}")
        for name, least in (("block_size", 1), ("sparse_block_size", 0), ("sparsity_factor", 0)):
            if not _is_count(getattr(self, name), least):
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be a whole number, at least {least}")
        if not _is_count(self.num_global_tokens, 0) or self.num_global_tokens > MAX_GLOBAL_TOKENS:
            raise UserError(
                f"num_global_tokens is {self.num_global_tokens!r}; choose a whole number up to {MAX_GLOBAL_TOKENS}"
            )
        if not _is_count(self.lsh_num_pre_rounds, 0):
            raise UserError(f"lsh_num_pre_rounds is {self.lsh_num_pre_rounds!r}; it must be 0 or more")
        self._check_division()

    def _check_division(self) -> None:
        factor, block, sparse = self.sparsity_factor, self.block_size, self.sparse_block_size
        if factor and block % factor:
            raise UserError(
                f"block_size {block} is not divisible by sparsity_factor {factor}; change one of them "
                f"(sparsity_factor may be {', '.join(map(str, _divisors(block)))})"
            )
        chunked = self.sparsity_type in ("norm", "lsh") and self.has_sparse and factor > 1 and sparse < block
        if chunked and (block % sparse or sparse % factor):
            raise UserError(
                f"sparse_block_size {sparse} must divide block_size {block} and be divisible by sparsity_factor "
                f"{factor} for sparsity_type {self.sparsity_type!r}; sparse_block_size={block} always works"
            )

    @property
    def has_sparse(self) -> bool:
        """Whether there are sparse keys at all."""
        return self.sparsity_type != "none" and self.sparse_block_size > 0 and self.sparsity_factor > 0

    @property
    def pooled(self) -> bool:
        """Whether sparse keys are mixtures of tokens (with a factor of 1 every type returns the tokens themselves)."""
        return self.has_sparse and self.sparsity_type in POOLED and self.sparsity_factor > 1

    @property
    def pools_padding(self) -> bool:
        """Whether padding can be seen, by `padding_in_pools`."""
        by_bos = self.sparsity_type == "bos_pooling" or (
            self.sparsity_type == "lsh" and self.chunk_size == self.sparsity_factor
        )
        return self.padding_in_pools and by_bos and self.pooled

    @property
    def sparse_per_block(self) -> int:
        """Sparse keys that each block of tokens contributes."""
        return self.block_size // self.sparsity_factor if self.has_sparse else 0

    @property
    def chunk_size(self) -> int:
        """Tokens among which `norm` and `lsh` choose."""
        return min(self.block_size, self.sparse_block_size)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _divisors(number: int) -> list[int]:
    return [factor for factor in range(1, number + 1) if number % factor == 0]
