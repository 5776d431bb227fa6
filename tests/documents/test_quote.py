"""What the README says of speed is copied from what the benchmarks printed, and from nowhere else."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest

from tests.conftest import ROOT

REAL = """A processor, 2 threads, torch 9
### Whole encoder: 128 tokens, 20 documents, 50 rounds

| attention | median ms | SDPA ÷ this | peak MB | pooled cosine | token cosine | of the bound |
|---|---|---|---|---|---|---|
| SDPA softmax | 2.0 | 1.00 | 3 |  |  |  |
| auto | 2.1 | 0.98 | 4 | 1.0000 | 1.0000 |  |

### Whole encoder: 2,048 tokens, 20 documents, 5 rounds

| attention | median ms | SDPA ÷ this | peak MB | pooled cosine | token cosine | of the bound |
|---|---|---|---|---|---|---|
| SDPA softmax | 20.0 | 1.00 | 3 |  |  | 0.50 |
| no attention | 10.0 | 2.00 | 4 |  |  | 1.00 |
| auto | 12.5 | 1.60 | 5 | 0.9911 | 0.9901 | 0.80 |

### A layer of RoBERTa-base: 4,096 tokens, forward, 5 rounds

| attention | median ms | min – max | SDPA ÷ this | peak MB | recall | output error | of the bound |
|---|---|---|---|---|---|---|---|
| SDPA softmax | 20.0 | 19.0 – 21.0 | 1.00 | 7 |  |  | 0.54 |
| window 257 | 11.0 | 10.0 – 12.0 | 1.70 | 8 | 0.500 | 0.250 | 0.92 |

### Growth at a recall of 0.950

- growth, 4,096 to 32,768 tokens, routed, recall 0.95: 1.15

Another processor, 2 threads, torch 9

### Front door: learning from 200 passages

fit: 30 seconds (40 of a core); index: 2.28 MiB
the block of the README: 41 seconds

### Front door: quality at density 0.1, at every length

| tokens | documents | pooled cosine | least |
|---|---|---|---|
| 2,048 | 10 | 0.9955 | 0.9944 |

### Front door: time of auto in that of the dense model

| tokens | dense ms | auto ÷ dense |
|---|---|---|
| 128 | 10.0 | 1.00 |
| 2,048 | 100.0 | 0.50 |

A third processor, 1 threads, torch 9

### Equal cost: e5small, 512 tokens

```
cost
```
A third processor, 1 threads, torch 9

### Equal time: e5small, 2,048 tokens, 6 documents

| attention | whose | time ÷ SDPA | error | pooled cosine | token cosine | beaten by |
|---|---|---|---|---|---|---|
| Refined (level 2.5) | ours | 0.500 | 0.1000 | 0.9950 | 0.9900 | **nothing** |
| Window (65) | others | 0.600 | 0.5000 | 0.8000 | 0.7000 | Refined (level 2.5) |

- Of 1 arms of ours, beaten by others: none.
"""


@pytest.fixture(scope="module")
def quote() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quote", ROOT / "benchmarks" / "quote.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_quoted(quote: ModuleType) -> None:
    said = quote.encoder(REAL)
    assert "| auto | 1.60 (0.9911, 0.9901) | 5 |" in said
    assert "| no attention | 2.00 | 4 |" in said
    assert said.endswith("`auto` beside SDPA: 0.98 at 128 tokens.")
    assert "| window 257 | 1.70 (0.92; 0.250) |" in quote.shape(REAL)
    door = quote.front_door(REAL)
    assert door.startswith("Another processor, 2 threads, torch 9; fit: 30 seconds")
    assert "| speed with `auto` | 1.00 | 2.00 |" in door
    assert door.endswith("|  | 0.9955 |")
    assert quote.below("Equal cost: e5small", REAL) == "512 tokens:\n\n```\ncost\n```"
    timed = quote.equal_time(REAL)
    assert timed.startswith("2,048 tokens, 6 documents:\n\n| attention |")
    assert "| Refined (level 2.5) | ours |" in timed
    assert "Window" not in timed
    assert timed.endswith("beaten by others: none.")
    assert quote.growth(REAL) == "Exponents from 4,096 to 32,768 tokens: 1.15 (routed, recall 0.95)."


def test_what_was_not_measured_stays(quote: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert quote.quoted("attention", REAL, "before") == "before"
    assert "attention: " in capsys.readouterr().out


def test_every_mark_has_a_writer(quote: ModuleType) -> None:
    marks = [match[2] for page in quote.PAGES for match in quote.QUOTED.finditer(page.read_text(encoding="utf-8"))]
    assert {*marks} == {*quote.WRITERS}
