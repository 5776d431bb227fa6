"""What a text is turned into, measured without labels: a model that has an encoder and no head to ask.

The model's own dense attention is the reference. Token states and texts (the mean of a text's states) are compared with it by
their cosine; the similarities of all pairs of texts by Spearman's rank correlation; and each text is looked up among all of them
by its title, which is no part of it. Titles are short, so they are encoded once, with the model's own attention.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefinder.corpora import Corpus
from sparsefinder.corpora.blocks import draw, pad
from sparsefinder.errors import UserError
from sparsefinder.evaluation.tasks.judges import Batch, inputs_of
from sparsefinder.evaluation.tasks.labelled import Asked, Request
from sparsefinder.storage import distributed
from sparsefinder.storage.store import Store

log = logging.getLogger(__name__)

CLOSE = 0.985  # cosine from which on the state of a token counts as kept
_SENTENCE = re.compile(r"(?<=[.!?])\s")
_LONGEST_TITLE = 200  # characters; of a longer first line the first sentence is the title


# ---- measures ----


def pooled(states: Tensor, valid: Tensor) -> Tensor:
    """The mean of each text's states: ``(B, N, E)``, ``valid (B, N)`` → ``(B, E)`` float32."""
    weights = valid[..., None].float()
    return (states.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def token_cosines(states: Tensor, reference: Tensor) -> Tensor:
    """Cosine of each state with the reference's: two ``(B, N, E)`` → ``(B, N)`` float32."""
    return F.cosine_similarity(states.float(), reference.float(), dim=-1).clamp_max(1.0)  # rounding goes beyond


def rank_correlation(texts: Tensor, reference: Tensor) -> float:
    """Spearman's correlation between the cosines of all pairs of texts, two ``(T, E)``; NaN of fewer than three texts."""
    first, second = torch.triu_indices(len(texts), len(texts), offset=1)
    sides = [F.normalize(x.double(), dim=-1) for x in (texts, reference)]
    ranks = [pd.Series((x[first] * x[second]).sum(-1).numpy()).rank() for x in sides]
    return float(ranks[0].corr(ranks[1])) if len(texts) > 2 else float("nan")


def retrieval(queries: Tensor, texts: Tensor) -> tuple[float, float]:
    """How often the text of a query is the most similar one, and the mean reciprocal rank: two ``(T, E)``, row for row."""
    similar = F.normalize(queries.double(), dim=-1) @ F.normalize(texts.double(), dim=-1).mT
    rank = 1 + (similar > similar.diagonal()[:, None]).sum(-1)
    return float((rank == 1).double().mean()), float((1.0 / rank).mean())


# ---- the task ----


@dataclass(frozen=True)
class States:
    """The judge: every state beside that of the dense model, which a batch carries as ``reference``."""

    unit: str = "tokens"
    asked: str = "tokens"
    measures: tuple[str, ...] = (
        *("retrieval_accuracy", "retrieval_mrr", "similarity_spearman", "token_cosine", "pooled_cosine"),
    )

    def judge(self, output: Any, batch: Batch) -> tuple[Tensor, list[Any]]:
        """Of each text its tokens, the sum of 1 − cosine, and the tokens that are kept, ``(B, 3)``; its three vectors."""
        states, valid = output.last_hidden_state, batch["attention_mask"].bool()
        cosines = token_cosines(states, batch["reference"]).double().masked_fill(~valid, 1.0)
        sums = torch.stack([valid.sum(-1), (1.0 - cosines).sum(-1), (valid & (cosines >= CLOSE)).sum(-1)], dim=-1)
        vectors = (pooled(states, valid), pooled(batch["reference"], valid), batch["title"])
        return sums.double().cpu(), list(zip(*(each.float().cpu() for each in vectors), strict=True))

    def scores(self, blocks: pd.DataFrame, answers: Sequence[Any]) -> dict[str, float]:
        """As `Judge`."""
        texts, reference, titles = (torch.stack(each) for each in zip(*answers, strict=True))
        accuracy, reciprocal = retrieval(titles, texts)
        cosine = 1.0 - float(blocks["loss"].sum()) / int(blocks[self.unit].sum())
        values = (accuracy, reciprocal, rank_correlation(texts, reference), cosine)
        return dict(zip(self.measures, (*values, float(token_cosines(texts, reference).mean())), strict=True))


def ask_states(request: Request, store: Store, model: Any, tokenizer: Any, length: int) -> Asked:
    """The encoder of a model, and texts of the corpus with what it makes of them by its own attention."""
    if request.adapt_examples:
        raise UserError("adapt_steps trains on a loss, and an encoder's states have none: give adapt_steps=0")
    cache = store.scratch("corpus")
    texts = distributed.first_then_all(
        lambda: passages(request.corpus, request.split, cache, request.samples, request.seed)
    )
    encoder = model.base_model
    batches = embedding_batches(encoder, tokenizer, texts, length, request.batch_size)
    lengths = torch.cat([batch["attention_mask"].sum(-1) for batch in batches])
    full = float((lengths == length).double().mean())
    log.info("%d texts of %d tokens at most, %.0f %% of them as long", len(lengths), length, 100 * full)
    return Asked(encoder, States(), batches, [], {"texts": len(lengths), "full_texts": full})


def passages(corpus: Corpus, split: str, cache: Any, samples: int, seed: int) -> list[tuple[str, str]]:
    """Titles and the texts below them, of so many documents."""
    found = [parts for text in corpus.documents(split, cache) if (parts := titled(text)) is not None]
    if len(found) < 2:
        raise UserError(
            f"the {split} split of the corpus has {len(found)} documents with a title and a text below it: retrieval needs 2"
        )
    chosen = draw(len(found), min(samples, len(found)), seed, f"the {split} split of the corpus")
    return [found[index] for index in chosen]


def titled(text: str) -> tuple[str, str] | None:
    """The first line of a document, or its first sentence where that line is long, and the rest; None without a rest."""
    first, _, rest = text.strip().partition("\n")
    if len(first) > _LONGEST_TITLE or not rest.strip():
        first, rest = (*_SENTENCE.split(text.strip(), maxsplit=1), "")[:2]
    title = first.strip(" =#*\t")
    return (title, rest.strip()) if title and rest.strip() else None


@torch.inference_mode()
def embedding_batches(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, str]], length: int, batch_size: int
) -> list[Batch]:
    """Batches of texts with what the dense model makes of them.

    Args:
        model: an encoder, with the attention that is the reference.
        tokenizer: its tokenizer.
        texts: a title and a text each.
        length: most tokens of a text.
        batch_size: texts in a batch.

    Returns:
        ``input_ids``, ``attention_mask (B, N)``, ``reference (B, N, E)`` float16 and ``title (B, E)`` float32.
    """

    def read(some: Sequence[str]) -> Batch:
        rows = [torch.tensor(tokenizer(text, truncation=True, max_length=length)["input_ids"]) for text in some]
        ids, valid = pad(rows, tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": valid.long()}

    def states(batch: Batch) -> Tensor:
        inputs = {name: tensor.to(model.device) for name, tensor in inputs_of(batch).items()}
        encoded: Tensor = model(**inputs).last_hidden_state
        return encoded.cpu()

    batches = []
    for start in range(0, len(texts), batch_size):
        some = texts[start : start + batch_size]
        titles, batch = read([title for title, _ in some]), read([text for _, text in some])
        batch["title"] = pooled(states(titles), titles["attention_mask"].bool())
        batch["reference"] = states(batch).half()
        batches.append(batch)
    return batches
