"""How many answers are right: scores of classes and of spans of text, in the words of the field, without a library for them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(pairs: Sequence[tuple[int, int]]) -> float:
    """Share of the pairs (answer, truth) that are equal."""
    return sum(answer == truth for answer, truth in pairs) / len(pairs)


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """F1 of each class that was answered or is the truth, and the mean of them: a rare class counts as much as a common one.

    ``2·tp / (2·tp + fp + fn)`` of the pairs (answer, truth).
    """
    right = Counter(answer for answer, truth in pairs if answer == truth)
    answered, there = Counter(answer for answer, _ in pairs), Counter(truth for _, truth in pairs)
    scores = [2 * right[name] / (answered[name] + there[name]) for name in {**answered, **there}]
    return sum(scores) / len(scores)


def normalized(text: str) -> str:
    """A span as SQuAD compares it (Rajpurkar et al. 2016): lower case, no punctuation, no articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, truth: str) -> float:
    """1 where both are the same after `normalized`, else 0."""
    return float(normalized(answer) == normalized(truth))


def span_f1(answer: str, truth: str) -> float:
    """F1 of the words of two spans, each word as often as it occurs; of two empty ones 1."""
    words, others = normalized(answer).split(), normalized(truth).split()
    if not words or not others:
        return float(words == others)
    return 2 * sum((Counter(words) & Counter(others)).values()) / (len(words) + len(others))


def best(measure: Callable[[str, str], float], answer: str, truths: Sequence[str]) -> float:
    """The largest value against any of several right answers, as SQuAD counts."""
    return max(measure(answer, truth) for truth in truths)
