"""Another head on a finetuned model, trained by the Trainer of transformers under the model's own attention.

The same head is then measured under every variant of the attention. It is kept in the run's scratch folder as
``save_pretrained`` writes it, so that it is trained once; a training that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors.torch import load_model
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, set_seed

from sparsefinder import models
from sparsefinder.errors import UserError, check_counts
from sparsefinder.evaluation.tasks.judges import Batch
from sparsefinder.models.trainer import OneDevice, Reporting, last_checkpoint
from sparsefinder.models.transformers_internals import forget_attention
from sparsefinder.storage import distributed
from sparsefinder.storage.files import remove, write_text
from sparsefinder.storage.manifests import content_hash

if TYPE_CHECKING:
    from sparsefinder.evaluation.tasks.labelled import Feature

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeadSettings:
    """How long, and how, the model with its new head is finetuned."""

    steps: int = 500
    batch_size: int = 16  # examples at once, on each device
    learning_rate: float = 5e-5  # of the whole model; a head alone would need more
    warmup: int = 50  # steps
    weight_decay: float = 0.01
    clip: float = 1.0  # of the gradient's norm
    save_steps: int = 100  # between two checkpoints
    seed: int = 0  # of the head's weights and the order of the examples

    def __post_init__(self) -> None:
        check_counts("evaluate.head", self, "steps", "batch_size", "save_steps")
        for name in ("warmup", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"evaluate.head.{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise UserError(f"evaluate.head.{name} must be positive, got {getattr(self, name)}")

    @property
    def examples(self) -> int:
        """Most examples that a device can meet."""
        return self.steps * self.batch_size


def with_head(model: PreTrainedModel, head: str, classes: Sequence[str], seed: int) -> PreTrainedModel:
    """A model of the class behind ``head`` (AutoModelFor…) with the body and the attention of ``model``, and a random head."""
    config = copy.deepcopy(model.config)
    if classes:
        config.id2label = dict(enumerate(classes))  # which sets num_labels too
        config.label2id = {name: index for index, name in enumerate(classes)}
        config.problem_type = "single_label_classification"
    else:
        config.num_labels = 2  # the start and the end of a span
    forget_attention(config)
    set_seed(seed)
    try:
        made: PreTrainedModel = getattr(transformers, head).from_config(config)
    except ValueError as error:  # no class of that kind in this family
        raise UserError(f"a {config.model_type} has no {head} in transformers: choose another task or model") from error
    keys = made.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    lost = [key for key in keys.missing_keys if not key.startswith("pooler.")]  # a masked language model has none
    if lost or keys.unexpected_keys:
        raise UserError(f"the weights of {config.model_type} do not fit into {type(made).__name__}: {lost[:3]}")
    models.set_normalizer(made, models.get_normalizer(model))
    return made.eval()


def finetuned(
    model: PreTrainedModel,
    features: Sequence[Feature],
    collate: Callable[[Sequence[Feature]], Batch],
    tokenizer: Any,
    settings: HeadSettings,
    folder: Path,
) -> PreTrainedModel:
    """``model`` after it was trained on ``features``, or as it was kept in ``folder``, which belongs to all of these."""
    kept, proof = folder / "model", folder / "model.sha256"
    if distributed.once(lambda: proof.is_file() and kept.is_dir() and proof.read_text() == content_hash(kept)):
        log.info("%s: trained already, read from %s", type(model).__name__, kept)
        load_model(model, kept / "model.safetensors", device=str(model.device))
        return model.eval()
    _train(model, features, collate, settings, folder)
    model.eval()
    distributed.once(lambda: _keep(model, tokenizer, kept, proof))
    return model


def _keep(model: PreTrainedModel, tokenizer: Any, kept: Path, proof: Path) -> None:
    remove(kept)
    model.save_pretrained(kept, max_shard_size="1000GB")  # one file: that is what is read again
    tokenizer.save_pretrained(kept)
    write_text(proof, content_hash(kept))
    for checkpoint in kept.parent.glob("checkpoint-*"):
        remove(checkpoint)


def _train(
    model: PreTrainedModel,
    features: Sequence[Feature],
    collate: Callable[[Sequence[Feature]], Batch],
    settings: HeadSettings,
    folder: Path,
) -> None:
    arguments = OneDevice(
        output_dir=str(folder),
        max_steps=settings.steps,
        train_sampling_strategy="sequential",  # `_Epochs` are in their order
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=min(settings.warmup, settings.steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        save_strategy="steps",
        logging_strategy="steps",
        save_steps=settings.save_steps,
        logging_steps=settings.save_steps,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        use_cpu=distributed.count() > 1 and not torch.cuda.is_available(),  # or the Trainer does not see the others
        seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    name, device = type(model).__name__, model.device
    count = settings.examples * arguments.world_size
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_Epochs(features, count, settings.seed),
        data_collator=collate,
        callbacks=[Reporting(name)],
    )
    trainer.model_accepts_loss_kwargs = False  # a batch is a step: the mean over its examples
    trainer.remove_callback(PrinterCallback)
    if arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
    checkpoint = distributed.once(lambda: last_checkpoint(folder))
    if checkpoint is not None:
        log.info("%s: going on from %s", name, checkpoint.name)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    nn.Module.to(model, device)  # variants are measured where the model was, on whatever the Trainer has put it


class _Epochs(Dataset["Feature"]):
    """Everything that a training will see, in order: each pass over the examples is shuffled anew, by the seed."""

    def __init__(self, features: Sequence[Feature], count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        passes = -(-count // len(features))
        order = torch.cat([torch.randperm(len(features), generator=generator) for _ in range(passes)])
        self.features, self.order = features, order[:count].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Feature:
        return self.features[self.order[index]]
