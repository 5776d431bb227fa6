"""The front door as a user calls it, on a sentence encoder: seconds and size of ``fit``, quality, and what ``auto`` costs.

    python benchmarks/front_door.py --model FOLDER --train valid.txt --test test.txt > benchmarks/front_door.md  # five minutes
    python benchmarks/quote.py                                                           # into docs/how-to/long_documents.md

Four parts, each a table or a line:

1. ``fit`` on 200 passages of 510 tokens of ``--train``: seconds, and the index on the disk.
2. The block of the README, word for word but for the names of the model and of the file: seconds. Its first run on a machine also
   compiles.
3. ``attach(density=0.1, auto=False)``: cosine of pooled documents of ``--test`` with those of the dense model, by length. The
   position table is repeated where it is too short, as the converters do.
4. ``attach(density=0.1)``: time of the model in that of its dense self (transformers' own SDPA), by length, round by round.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import recorded
import torch
from measuring import machine, measure
from torch import Tensor

import sparsefinder
from sparsefinder import models
from sparsefinder.evaluation.tasks.embedding import pooled, token_cosines

PASSAGES, LENGTH = 200, 510
DENSITY = 0.1
README = Path(__file__).parent.parent / "README.md"


def passages(file: Path, tokenizer: Any) -> list[str]:
    """Stretches of a text, as strings."""
    ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.decode(ids[start : start + LENGTH]) for start in range(0, PASSAGES * LENGTH, LENGTH)]


def learned(folder: Path, train: Path) -> sparsefinder.Index:
    """An index, and what it took."""
    model, tokenizer = models.load_encoder(folder)
    texts = passages(train, tokenizer)
    start, cpu = time.perf_counter(), time.process_time()
    index = sparsefinder.fit(model, tokenizer, texts)
    seconds, busy = time.perf_counter() - start, time.process_time() - cpu
    with tempfile.TemporaryDirectory() as saved:
        index.save(saved)
        size = sum(file.stat().st_size for file in Path(saved).iterdir()) / (1 << 20)
    print("\n### Front door: learning from 200 passages\n")
    print(f"fit: {seconds:.0f} seconds ({busy:.0f} of a core); index: {size:.2f} MiB", flush=True)
    return index


def the_block(folder: Path, train: Path) -> None:
    """Run what the README shows."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    code = next(block for block in blocks if "sparsefinder.fit(" in block)
    code = code.replace("roberta-base", str(folder.resolve())).replace("train.txt", str(train.resolve()))
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as empty:
        os.chdir(empty)
        try:
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(code, str(README), "exec"), {})
            seconds = time.perf_counter() - start
        finally:
            os.chdir(before)
    print(f"the block of the README: {seconds:.0f} seconds", flush=True)


def run(model: Any, ids: Tensor) -> Tensor:
    """Token states ``(1, N, E)``."""
    states: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return states


def quality(dense: Any, sparse: Any, documents: list[Tensor]) -> list[float]:
    """The cosine of each pooled document."""
    found = []
    for ids in documents:
        valid = torch.ones(ids.shape, dtype=torch.bool)
        both = (pooled(run(model, ids), valid) for model in (dense, sparse))
        found.append(float(token_cosines(*both).mean()))
    return found


@torch.inference_mode()
def main() -> None:
    parser = recorded.arguments(__doc__, "BERT or RoBERTa encoder")
    parser.add_argument("--tokens", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192], help="for quality")
    parser.add_argument("--timed", type=int, nargs="*", default=[128, 256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--documents", type=int, default=10, help="at most, of 4 × 8,192 tokens together")
    parser.add_argument("--index", type=Path, help="an index that was saved, instead of the first two parts")
    given = parser.parse_args()
    print(machine())
    if given.index:
        index = sparsefinder.Index.load(given.index)
    else:
        with torch.inference_mode(False):
            index = learned(given.model, given.train)
            the_block(given.model, given.train)
    dense, tokenizer = recorded.lengthened(given.model, max([*given.tokens, *given.timed]))
    sparse, auto = copy.deepcopy(dense), copy.deepcopy(dense)
    sparsefinder.attach(sparse, index, density=DENSITY, auto=False)
    sparsefinder.attach(auto, index, density=DENSITY)
    print(f"\n### Front door: quality at density {DENSITY}, at every length\n")
    print("| tokens | documents | pooled cosine | least |")
    print("|---|---|---|---|")
    for tokens in given.tokens:
        count = max(2, min(given.documents, 4 * 8192 // tokens))
        found = quality(dense, sparse, recorded.texts(given.test, tokenizer, tokens, count))
        print(f"| {tokens:,} | {len(found)} | {sum(found) / len(found):.4f} | {min(found):.4f} |", flush=True)
    print("\n### Front door: time of auto in that of the dense model\n")
    print("| tokens | dense ms | auto ÷ dense |")
    print("|---|---|---|")
    for tokens in given.timed:
        ids = recorded.texts(given.test, tokenizer, tokens, 1)[0]
        calls = {"dense": lambda ids=ids: run(dense, ids), "auto": lambda ids=ids: run(auto, ids)}
        measured = measure(calls, max(3, min(60, 32_768 // tokens)))
        ratio = 1 / measured["auto"].faster_than(measured["dense"])
        print(f"| {tokens:,} | {1e3 * measured['dense'].median:,.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
