"""How a certificate is measured: a model as it is looked at, loaded again and compared, saved with the proof or not at all."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from sparsefinder.conversions.card import write
from sparsefinder.conversions.certificate import Certificate, Check, at_most, equals
from sparsefinder.conversions.checks import max_difference
from sparsefinder.conversions.staging import staged_folder


@contextmanager
def measuring(model: Any) -> Iterator[Any]:
    """The model in evaluation mode and without gradients; afterwards in the mode that it had."""
    training = model.training
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        model.train(training)


def in_float32(model: Any) -> Any:
    """The model itself where it is float32, else a copy of it in float32."""
    return model if model.dtype == torch.float32 else copy.deepcopy(model).float()


def save_certified(
    model: Any, tokenizer: Any, certificate: Certificate, out: str | Path, reloaded: Callable[[Path], Iterable[Check]]
) -> Certificate:
    """Save a converted model with its certificate, or nothing.

    Args:
        model: the converted model.
        tokenizer: its tokenizer.
        certificate: what was checked before saving.
        out: the folder to make: what `save_pretrained` writes, `conversion.json` and the certificate in `README.md`.
        reloaded: the checks of what was saved in a folder.

    Returns:
        The certificate with the checks of `reloaded`.

    Raises:
        UserError: if a check fails or `out` exists; then nothing is left behind.
    """
    certificate.require()
    with staged_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        certificate = certificate.with_checks(*reloaded(folder))
        certificate.require()
        write(certificate, folder)
    return certificate


def load_again(model: Any, folder: Path) -> tuple[Any, Check]:
    """The model as it was saved in `folder`, in the dtype and on the device of `model`, and whether all weights came along."""
    again, report = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
    missing = sorted(report["missing_keys"])
    return again.to(model.device), equals("weights missing after reload", len(missing), 0, ", ".join(missing))


def load_tokenizer_again(folder: Path, length: int) -> tuple[Any, Check]:
    """The tokenizer as it was saved in `folder`, and whether it cuts at `length` tokens."""
    again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return again, equals("tokenizer's model_max_length after reload", int(again.model_max_length), length)


def compare_reloaded(before: Any, after: Any, states: Callable[[Any], Tensor], tokens: int) -> Check:
    """That a saved model gives the same `states (B, N, E)`, to the last digit, on one input of that many tokens."""
    difference = max_difference(states(before), states(after))
    return at_most("difference after save and reload", difference, 0.0, f"one input of {tokens} tokens")
