"""An initialisation for small models on small budgets: what can be counted need not be learned.

A masked language model that starts from plain random weights first spends most of a short training on its word frequencies,
and then sits on a plateau until its embeddings mean something and its attention passes anything useful on. Six things can be
written into the weights beforehand; all of them stay free to change, but for the frequencies in a BART, whose bias is a buffer:

1. the bias of the head is the logarithm of the words' frequencies;
2. the embedding of a word is its row in a factorization of positive pointwise mutual information, counted in the training
   part (Levy and Goldberg 2014, Neural word embedding as implicit matrix factorization);
3. positions are sinusoids, which make "so many words to the left" the same direction everywhere (Vaswani et al. 2017);
4. queries start out equal to keys, so attention begins with what is alike in meaning and position;
5. the output of attention starts out as the transpose of its values, so it passes on what it looked at (4 and 5: Trockman
   and Kolter 2023, Mimetic initialization of self-attention layers, https://arxiv.org/abs/2305.09828; there by a spectral
   factorization with noise, here by equal random matrices); and
6. the heads of the first layer start out looking at the words beside them, one offset each (a rotation of the sinusoids).

In an encoder-decoder all of this is written into both of its halves and into the attention between them. The decoder's word
then finds the same word in the text that the encoder read, which knows the word after it by (6) and passes it on by (5): what
stands there is copied, before anything is learned. In a causal half the heads of (6) look back alone.

On the tiny experiment this is the difference between a loss below the unigram entropy after one minute of training or five.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsefinder.corpora import TokenBlocks
from sparsefinder.errors import UserError
from sparsefinder.models.position_tables import reserved_rows_of

_ROTARY = ("modernbert",)  # where positions turn queries and keys, and all three projections are one
_TWO_TEXTS = ("bart",)  # where a decoder looks at what an encoder read
FAMILIES = (
    "roberta",
    "bert",
    "xlm-roberta",
    "camembert",
    *_ROTARY,
    *_TWO_TEXTS,
)  # where these things have names that are known here

_REACH = 4  # words to each side that are counted as neighbours, the d-th with weight 1/d
_MOST_WORDS = 8192  # that get a counted embedding, the most frequent ones: memory grows with the square
_SMOOTHING = 0.75  # exponent of the context's frequency (Levy, Goldberg and Dagan 2015)
_ALIKE = 2.0  # variance of the entries of a query: a token's score with itself starts at 2√D
_PASSED = 0.8  # share of a value that attention passes on
_BESIDE = 1.4  # weight of "look beside you" in the first layer's queries and keys
_SHARED = 4.0  # where positions only turn vectors: a coordinate of all words, in standard deviations of the others
_LESS_ALIKE = (
    0.3  # there, what is left of the first layer's look for what is alike, which would outweigh the word beside
)
_TURNS = 0.03  # and the slowest turn from a position to the next that tells two neighbours apart
_BESIDE_BY_TURNING = 1.9  # and the weight of the shared coordinate
_OFFSETS = (-1, 1, -2, 2, -3, 3, -4, 4)  # of its heads, in turn
_BACK = (-1, -2, -3, -4)  # of those that see no later word


@torch.no_grad()
def from_statistics(model: PreTrainedModel, blocks: TokenBlocks, special: list[int]) -> None:
    """Write word frequencies, word vectors, positions and mimetic attention into the weights of a new model.

    Uses torch's global random state.

    Args:
        model: a new model, changed in place.
        blocks: the training part of a corpus.
        special: ids without meaning of their own, which keep their random embeddings.

    Raises:
        UserError: for a family whose weights have other names.
    """
    config: Any = model.config
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model.start=statistics works for the families {', '.join(FAMILIES)}, not for {config.model_type}"
        )
    words: Any = model.get_input_embeddings()
    frequencies = blocks.ids.long().bincount(minlength=len(words.weight)).double() + 0.5
    logarithms = frequencies.log()
    two_texts = config.model_type in _TWO_TEXTS
    head: Any = model if two_texts else model.get_output_embeddings()
    bias: Tensor = head.final_logits_bias[0] if two_texts else head.bias
    bias.copy_(logarithms - logarithms.mean())

    size, scale = config.hidden_size, _scale(config)
    ranked = frequencies.argsort(descending=True, stable=True)
    ranked = ranked[~torch.isin(ranked, torch.tensor(special))][:_MOST_WORDS]
    words.weight[ranked] = word_vectors(blocks, ranked, size) * scale * math.sqrt(size)
    if two_texts:
        _between_texts(model)
    else:
        (_rotary if config.model_type in _ROTARY else _with_a_table)(model)


def _with_a_table(model: PreTrainedModel) -> None:
    """Positions and attention of a family with a table of positions."""
    config: Any = model.config
    encoder: Any = model.base_model
    table = encoder.embeddings.position_embeddings.weight
    reserved = reserved_rows_of(config)
    table[reserved:] = sinusoids(len(table) - reserved, table.shape[1]) * config.initializer_range * math.sqrt(2.0)
    for layer in encoder.encoder.layer:
        attention = layer.attention.self
        projections = (attention.query.weight, attention.key.weight, attention.value.weight)
        _mimetic(*projections, layer.attention.output.dense.weight)
    first = encoder.encoder.layer[0].attention.self
    look_beside(first.query.weight, first.key.weight, config.num_attention_heads, len(table) - reserved)


def _between_texts(model: PreTrainedModel) -> None:
    """The same in both halves of an encoder-decoder, and between them."""
    config: Any = model.config
    halves: Any = model.base_model
    reserved = reserved_rows_of(config)
    for half, offsets in ((halves.encoder, _OFFSETS), (halves.decoder, _BACK)):
        table = half.embed_positions.weight
        table[reserved:] = sinusoids(len(table) - reserved, table.shape[1]) * _scale(config) * math.sqrt(2.0)
        for layer in half.layers:
            for each in (layer.self_attn, *((layer.encoder_attn,) if half is halves.decoder else ())):
                _mimetic(each.q_proj.weight, each.k_proj.weight, each.v_proj.weight, each.out_proj.weight)
        first = half.layers[0].self_attn
        heads = config.encoder_attention_heads if half is halves.encoder else config.decoder_attention_heads
        look_beside(first.q_proj.weight, first.k_proj.weight, heads, len(table) - reserved, offsets)


def _scale(config: Any) -> float:
    """The standard deviation of a family's random weights."""
    scale: float = config.init_std if config.model_type in _TWO_TEXTS else config.initializer_range
    return scale


def _rotary(model: PreTrainedModel) -> None:
    """The same where positions turn queries and keys: what is turned is one coordinate that all words share.

    That coordinate adds the same to the score of every word in the head, which is nothing.
    """
    config: Any = model.config
    encoder: Any = model.base_model
    words = encoder.embeddings.tok_embeddings.weight
    words[:, 0] += _SHARED * config.initializer_range
    for layer in encoder.layers:
        query, key, value = layer.attn.Wqkv.weight.chunk(3)
        _mimetic(query, key, value, layer.attn.Wo.weight)
    query, key, _ = encoder.layers[0].attn.Wqkv.weight.chunk(3)
    query *= _LESS_ALIKE
    key *= _LESS_ALIKE
    angles = getattr(encoder.rotary_emb, f"{config.layer_types[0]}_inv_freq")
    look_beside_by_turning(query, key, config.num_attention_heads, angles)


def _mimetic(query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
    """Attention that looks for what is alike and passes it on, in place; all ``(hidden, hidden)``."""
    hidden = query.shape[1]
    query.normal_(0.0, math.sqrt(_ALIKE / hidden))
    key.copy_(query)
    value.normal_(0.0, math.sqrt(_PASSED / hidden))
    output.copy_(value.T)


def word_vectors(blocks: TokenBlocks, words: Tensor, size: int) -> Tensor:
    """Vectors of length 1 whose products follow how much likelier two words are near each other than by chance.

    ``words``: ``(W,)`` ids. Returns ``(W, size)`` float32: the largest ``size`` factors of the symmetric matrix of
    ``max(0, log P(w, c) / P(w) P(c))``, turned at random so that no coordinate is special.
    """
    information = mutual_information(cooccurrences(blocks, words))
    size_found = min(size, len(words))
    left, strength, _ = torch.svd_lowrank(information, q=min(size_found + 8, len(words)), niter=3)
    vectors = left[:, :size_found] * strength[:size_found].sqrt()
    turned = vectors @ torch.linalg.qr(torch.randn(size, size)).Q[:size_found]
    return torch.nn.functional.normalize(turned)


def cooccurrences(blocks: TokenBlocks, words: Tensor) -> Tensor:
    """How often two of ``words`` stand within four positions of one block, by 1 / distance: symmetric ``(W, W)``."""
    count = len(words)
    rank = torch.full((max(int(blocks.ids.max()), int(words.max())) + 1,), -1)
    rank[words] = torch.arange(count)
    ids = rank[blocks.ids.long()]
    block = torch.repeat_interleave(torch.arange(len(blocks)), blocks.lengths)
    counted = torch.zeros(count * count)
    for distance in range(1, _REACH + 1):
        left, right = ids[:-distance], ids[distance:]
        pairs = (block[:-distance] == block[distance:]) & (left >= 0) & (right >= 0)
        counted += (left[pairs] * count + right[pairs]).bincount(minlength=count * count) / distance
    matrix = counted.view(count, count)
    return matrix + matrix.T


def mutual_information(counts: Tensor) -> Tensor:
    """Positive pointwise mutual information of symmetric ``counts (W, W)``, contexts smoothed; symmetric ``(W, W)``."""
    words = counts.sum(1) + 1.0
    contexts = words**_SMOOTHING
    expected = words[:, None] * (contexts / contexts.sum())[None]
    information = (counts / expected).clamp_min(1e-9).log().clamp_min(0.0)
    return (information + information.T) / 2


def sinusoids(positions: int, size: int) -> Tensor:
    """``(positions, size)``: sines and cosines with wavelengths from 2π to 2π times the number of positions."""
    angles = torch.arange(positions)[:, None] * _rates(positions, size)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :size]


def look_beside(query: Tensor, key: Tensor, heads: int, positions: int, offsets: tuple[int, ...] = _OFFSETS) -> None:
    """Add to ``query`` and ``key``, ``(H·D, hidden)``, what makes head ``h`` look ``offsets[h]`` words away, in place.

    Keys see the ``D`` fastest coordinates of the position, queries see them turned by the offset; the product is largest
    where the two agree.
    """
    size = query.shape[0] // heads // 2 * 2
    rates = _rates(positions, query.shape[1])[: size // 2]
    for head in range(heads):
        angles = rates * offsets[head % len(offsets)]
        turns = [torch.tensor([[c, s], [-s, c]]) for c, s in zip(angles.cos(), angles.sin(), strict=True)]
        start = head * (query.shape[0] // heads)
        query[start : start + size, :size] += _BESIDE * torch.block_diag(*turns)
        key[start : start + size, :size] += _BESIDE * torch.eye(size)


def look_beside_by_turning(query: Tensor, key: Tensor, heads: int, angles: Tensor) -> None:
    """As `look_beside`, where position ``i`` turns coordinates ``c`` and ``c + D/2`` of a head by ``i · angles[c]``.

    Both vectors are the same for all words, made of the coordinate 0 that these share; queries are turned by the offset more.
    """
    angles = angles[angles >= _TURNS]
    half = query.shape[0] // heads // 2
    for head in range(heads):
        first = head * 2 * half + torch.arange(len(angles))
        turned = angles * _OFFSETS[head % len(_OFFSETS)]
        query[first, 0] += _BESIDE_BY_TURNING * turned.cos()
        query[first + half, 0] += _BESIDE_BY_TURNING * turned.sin()
        key[first, 0] += _BESIDE_BY_TURNING


def _rates(positions: int, size: int) -> Tensor:
    """The angle by which each pair of coordinates turns from one position to the next."""
    return torch.exp(-math.log(positions) * torch.arange(0, size, 2) / size)
