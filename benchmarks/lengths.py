"""What a causal language model loses on texts longer than those it was trained on, and how many keys its entmax leaves it.

    python benchmarks/lengths.py runs/fixed runs/temperature runs/both                                # some minutes

Every model reads the same words of the test part of the docstrings at every length: blocks of the longest length, cut into
shorter ones. The loss is that of whole blocks and that of their second halves; keys are those of positive probability, the mean
over layers, heads and queries. Each model attends with its own entmax: docs/explanation/each_head.md trains them.
"""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sparsefinder import models
from sparsefinder.commandline.conf_folder import CONF
from sparsefinder.corpora import Docstrings, token_blocks
from sparsefinder.executors.support_lists import support
from sparsefinder.graphs import QK
from sparsefinder.models.learned_heads import get_heads
from sparsefinder.models.observed_attention import OwnDense, Watched


@torch.inference_mode()
def read(model: Any, texts: Tensor) -> dict[str, float]:
    """Loss in nats, of the second half too, and keys of positive probability a query, of texts ``(B, N)``."""
    counts: list[Tensor] = []
    own = OwnDense(models.normalizers(model), causal=True)

    def look(layer: int, qk: QK, v: Tensor, output: Tensor) -> None:
        counts.append(support(qk, own.normalizers[layer].alpha).counts.double())

    losses = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(models.plugged(model, Watched(own, look)))
        for text in texts.split(1):
            logits = model(text, attention_mask=torch.ones_like(text), use_cache=False).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1].float(), text[0, 1:], reduction="none"))
    loss, keys = torch.stack(losses), torch.cat(counts)
    half = texts.shape[1] // 2
    return {
        "loss": loss.mean().item(),
        "second half": loss[:, half - 1 :].mean().item(),
        "keys": keys.mean().item(),
        "keys of second half": keys[:, :, half:].mean().item(),
    }


def table(runs: Sequence[Path], lengths: Sequence[int], blocks: int) -> None:
    """Print a row for each run and length."""
    settings = yaml.safe_load((CONF / "corpus" / "docstrings.yaml").read_text(encoding="utf-8"))
    corpus = Docstrings(**{name: value for name, value in settings.items() if name != "_target_"} | {"pack": True})
    print(
        "| model | tokens | loss | perplexity | loss of second half | its perplexity | keys > 0 a query | in second half |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for run in runs:
        model, tokenizer = models.load_causal_lm(run / "model")
        found = token_blocks(corpus, tokenizer, "test", max(lengths), blocks, run / "scratch" / "corpus")
        texts = torch.stack([block for block in found if len(block) == max(lengths)])
        for length in lengths:
            row = read(model, texts.reshape(-1, length))
            figures = (row["loss"], math.exp(row["loss"]), row["second half"], math.exp(row["second half"]))
            print(
                f"| {run.name} | {length:,} | {figures[0]:.3f} | {figures[1]:.1f} | {figures[2]:.3f} | {figures[3]:.1f} "
                f"| {row['keys']:.1f} | {row['keys of second half']:.1f} |",
                flush=True,
            )
        print_heads(run.name, model)


def print_heads(name: str, model: Any) -> None:
    """What the heads learned, as a comment below their table."""
    values = get_heads(model)
    for what in ("alpha", "beta", "gamma"):
        learned = getattr(values, what)
        if learned is not None:
            print(
                f"<!-- {name} {what}: {' / '.join(' '.join(f'{x:.2f}' for x in row) for row in learned.tolist())} -->"
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run directories, with a model each")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--blocks", type=int, default=12, help="of the longest length")
    given = parser.parse_args()
    table(given.runs, given.lengths, given.blocks)
