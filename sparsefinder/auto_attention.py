"""Attention that is dense for a short text and predicted for a long one: ``(q, k, v, valid, layer) → output``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.attention import Bucketed, Dense
from sparsefinder.errors import UserError
from sparsefinder.executors import fastest_by_length
from sparsefinder.executors.choose_executor import AUTO
from sparsefinder.graphs import QK, Pattern
from sparsefinder.numerics.normalizers import Normalizer

_ENTMAX15 = Normalizer(1.5)  # the normalizer of the gold graphs


@dataclass(frozen=True)
class Auto:
    """`Dense` for a text below the length from which a prediction pays, `Bucketed` for a longer one: never the slower one.

    From which length on that is depends on the machine, the shape, the pattern and its layer. It is raced on the first text
    that is long enough to tell, on its own queries, keys and values, and kept in a file
    (`sparsefinder.executors.fastest_by_length`, which says where); that first call takes ten times as long as the others. The
    real tokens of an example decide, not what its batch is padded to. Softmax below that length is torch's SDPA.
    """

    pattern: Pattern  # who may attend to whom in a long text; must have a layout
    normalizer: Normalizer = _ENTMAX15  # how the scores become probabilities, in short and long texts alike
    causal: bool = False  # whether a query sees no later key
    executor: str = AUTO  # auto, native, blocks or triton, as in `Bucketed`; dense attention is executed likewise
    crossover: int | None = None  # fewest tokens that the prediction is used for; None: measured once on this machine

    def __post_init__(self) -> None:
        if self.crossover is not None and self.crossover < 0:
            raise UserError(f"crossover must be a number of tokens, 0 or more, or null, got {self.crossover}")
        _ = self._sparse  # what is wrong is said before any work

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor, layer: int, query_valid: Tensor | None = None
    ) -> Tensor:
        """``q (B, H, N_q, D)``, ``k, v (B, H_k, N_k, D)``, ``valid (B, N_k)`` bool → ``(B, H, N_q, D)`` in the dtype of ``v``.

        ``query_valid``, ``(B, N_q)`` bool, is given in cross-attention, where the number of keys decides.
        """
        long = self._long(QK(q, k, valid, self.causal, query_valid), v, layer)
        if all(long) or not any(long):
            return (self._sparse if any(long) else self._dense)(q, k, v, valid, layer, query_valid)
        output = torch.zeros_like(q, dtype=v.dtype)
        of = torch.tensor(long, device=q.device)
        for attention, rows in ((self._sparse, of), (self._dense, ~of)):
            keys = _last(valid[rows])
            queries = keys if query_valid is None else _last(query_valid[rows])
            output[rows, :, :queries] = attention(
                *(q[rows, :, :queries], k[rows, :, :keys], v[rows, :, :keys], valid[rows, :keys], layer),
                None if query_valid is None else query_valid[rows, :queries],
            )
        return output

    def is_softmax(self, q: Tensor, k: Tensor, layer: int) -> bool:
        """Whether it is settled that these are attended with torch's softmax attention, however much of them is padding.

        Whoever has a mask can then hand it to torch as it is, and need not ask what it says. False where it is not known yet.

        Args:
            q: Queries ``(B, H, N, D)``.
            k: Keys ``(B, H_k, N, D)`` of the same texts.
            layer: Whose.
        """
        if self.normalizer.alpha != 1.0 or self.causal:
            return False
        tokens = k.shape[2]
        if self.crossover is not None or tokens < fastest_by_length.LENGTHS[0]:
            return tokens < self._fewest
        known = self._brackets.get(_kind(q, k, False, layer))
        return known is not None and known.pays(tokens) is False

    @torch.no_grad()
    def graph(self, qk: QK, layer: int, rows: Tensor | None = None) -> Tensor:
        """The graph that is executed, ``(B, H, N, N)`` bool, or the rows of some queries: of a short text all its pairs."""
        long = torch.tensor(self._long(qk, qk.k, layer), device=qk.q.device)[:, None, None, None]
        return torch.where(long, self._sparse.graph(qk, layer, rows), self._dense.graph(qk, layer, rows))

    def computed_pairs(self, qk: QK, layer: int) -> Tensor:
        """Pairs that are multiplied, ``(B, H)`` int64."""
        long = torch.tensor(self._long(qk, qk.k, layer), device=qk.q.device)[:, None]
        return torch.where(long, self._sparse.computed_pairs(qk, layer), self._dense.computed_pairs(qk, layer))

    def explain(self, q: Tensor, *others: Tensor, layer: int = 0) -> str:
        """What is done with a text of as many tokens as these queries (and keys and values), and why: a line for each reason."""
        tokens, k = q.shape[2], others[0] if others else q
        pays: bool | None
        if self.crossover is not None:
            why, pays = f"from {self.crossover:,} tokens on, as crossover= says", tokens >= self.crossover
        else:
            known = fastest_by_length.known(self._key(q, k, False, layer))
            why, pays = f"{known}, as measured on this machine, {fastest_by_length.file()}", known.pays(tokens)
        if pays is None:
            return f"{tokens:,} tokens: measured when it is attended with; the prediction pays {why}"
        chosen = self._sparse if pays else self._dense
        name = "the prediction" if pays else "dense attention"
        return f"{tokens:,} tokens: {name}, since the prediction pays {why}\n{chosen.explain(q, *others)}"

    def _long(self, qk: QK, v: Tensor, layer: int) -> list[bool]:
        """Of each example, whether the prediction pays for it."""
        batch, tokens = qk.valid.shape
        if tokens < self._fewest:
            return [False] * batch
        lengths = [tokens] * batch if bool(qk.valid.all()) else qk.valid.sum(-1).tolist()
        if self.crossover is not None:
            return [length >= self.crossover for length in lengths]
        at = _kind(qk.q, qk.k, qk.crosses, layer)
        for row, length in enumerate(lengths):
            known = self._brackets.get(at)
            if known is None or known.pays(length) is None:
                self._brackets[at] = self._settled(qk, v, row, layer)
        return [bool(self._brackets[at].pays(length)) for length in lengths]

    @torch.no_grad()
    def _settled(self, qk: QK, v: Tensor, row: int, layer: int) -> fastest_by_length.Bracket:
        """What is known once one text is settled."""
        queries, keys = qk.queries_valid[row], qk.valid[row]
        q, k, v = qk.q.detach()[row, :, queries], qk.k.detach()[row, :, keys], v.detach()[row, :, keys]

        def race(tokens: int) -> tuple[float, float]:
            q_cut, k_cut, v_cut = (x[None, :, :tokens].contiguous() for x in (q, k, v))
            valid, query_valid = (torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device) for x in (k_cut, q_cut))
            given = None if qk.query_valid is None else query_valid

            def dense() -> Tensor:
                if self.normalizer.alpha == 1.0 and not self.causal:  # in its own precision: see `is_softmax`
                    return F.scaled_dot_product_attention(q_cut, k_cut, v_cut, enable_gqa=q.shape[0] != k.shape[0])
                return self._dense(q_cut, k_cut, v_cut, valid, layer, given)

            return fastest_by_length.timed(
                q.device, dense, lambda: self._sparse(q_cut, k_cut, v_cut, valid, layer, given)
            )

        return fastest_by_length.settled(self._key(qk.q, qk.k, qk.crosses, layer), k.shape[1], race)

    def _key(self, q: Tensor, k: Tensor, crosses: bool, layer: int) -> str:
        """What an answer of the race depends on, besides the machine."""
        heads = f"{q.shape[1]} heads of {q.shape[3]}{f' on {k.shape[1]}' if k.shape[1] != q.shape[1] else ''}"
        where = f"{q.device.type} with {torch.get_num_threads()} threads, executor {self.executor}"
        kind = f"{'cross-attention, ' if crosses else ''}{str(q.dtype).removeprefix('torch.')}"
        return f"layer {layer}, {heads}, {kind}, {where}, {self._fingerprint}"

    @property
    def _fewest(self) -> int:
        """Tokens below which nothing is asked."""
        return fastest_by_length.LENGTHS[0] if self.crossover is None else self.crossover

    @cached_property
    def _brackets(self) -> dict[tuple[object, ...], fastest_by_length.Bracket]:
        return {}

    @cached_property
    def _fingerprint(self) -> str:
        return fastest_by_length.fingerprint((self.pattern, self.normalizer, self.causal))

    @cached_property
    def _sparse(self) -> Bucketed:
        return Bucketed(self.pattern, self.normalizer, self.causal, self.executor)

    @cached_property
    def _dense(self) -> Dense:
        executor = "tiles" if self.executor == "blocks" else self.executor
        return Dense(self.normalizer, self.causal, executor=executor)


def _kind(q: Tensor, k: Tensor, crosses: bool, layer: int) -> tuple[object, ...]:
    """What an answer depends on, of one attention in one process."""
    return q.shape[1::2], k.shape[1], q.dtype, q.device.type, torch.get_num_threads(), crosses, layer


def _last(valid: Tensor) -> int:
    """Tokens up to the last real one of any example of ``valid (B, N)``, at least one."""
    positions = valid.any(0).nonzero()
    return int(positions.max()) + 1 if len(positions) else 1
