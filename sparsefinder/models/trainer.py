"""The Trainer of transformers, arranged so that a killed run ends as it would have ended.

What is read and masked at a step is a function of the seed and the step (`Examples`); the Trainer restores weights,
optimizer, schedule and random state from a checkpoint; checkpoints that a kill left half written are not used.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from sparsefinder import models
from sparsefinder.corpora import Batch, TokenBlocks
from sparsefinder.models.alpha_schedule import Annealing
from sparsefinder.models.learned_heads import Bounded, PerHeadSettings
from sparsefinder.models.masked_lm import masked_logits
from sparsefinder.models.objectives import Objective, collated, objective_of
from sparsefinder.models.replacement.each_head import LEARNED
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.storage import distributed
from sparsefinder.storage.files import remove

log = logging.getLogger(__name__)

_POOL = 8  # batches whose blocks are sorted by length together, so that little is padded


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How training goes, whatever is trained, on what, and how long."""

    alpha: float = 1.5  # of the entmax that the model ends with; 1 is softmax, 2 sparsemax
    alpha_schedule: bool = False  # anneal α from 1.01 to `alpha` over the first half of the steps
    per_head: PerHeadSettings = field(default_factory=PerHeadSettings)
    batch_size: int = 64  # blocks at once, on each device
    accumulation: int = 1  # batches that make one update
    learning_rate: float = 3e-5
    schedule: str = "linear"  # of the learning rate after its warm-up: linear, cosine or constant_with_warmup
    warmup: int = 500  # steps
    weight_decay: float = 0.01
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-6
    clip: Annotated[float, "or infinite"] = 5.0  # of the gradient's norm
    mask_fraction: float = 0.15  # of the tokens are asked for in training; validation always asks for 15 %
    eval_steps: int = 500  # between two looks at the validation loss, and two checkpoints
    # tensorboard, wandb, …, a list of them, or all that are installed: pip install 'sparsefinder[trackers]'
    report_to: str | tuple[str, ...] = "none"
    bf16: bool = False  # mixed precision where the device has it; the normalizer stays in float32
    longer_steps: int = (
        0  # the last steps, which read blocks of `longer_length` tokens, as a model for long texts is trained
    )
    seed: int = 0


def train(
    settings: TrainingSettings,
    steps: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    blocks: TokenBlocks,
    held_out: Sequence[Batch],
    folder: Path,
    longer: TokenBlocks | None = None,
) -> PreTrainedModel:
    """Train a language model in place; a run that was killed goes on from its last checkpoint.

    Args:
        settings: of the optimizer, the schedule and the masking.
        steps: updates, which those of the settings are, or their epochs amount to.
        model: the model that is trained.
        tokenizer: its tokenizer.
        blocks: of the training part.
        held_out: batches with labels to measure on.
        folder: where checkpoints go.
        longer: blocks of the same part that the last ``settings.longer_steps`` steps read; None where there are no such steps.
    """
    arguments = OneDevice(
        output_dir=str(folder),
        max_steps=steps,
        train_sampling_strategy="sequential",  # `Examples` are in their order
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=min(settings.warmup, steps),
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.clip,
        eval_strategy="steps",
        save_strategy="steps",
        logging_strategy="steps",
        eval_steps=settings.eval_steps,
        save_steps=settings.eval_steps,
        logging_steps=settings.eval_steps,
        save_total_limit=2,
        prediction_loss_only=True,
        remove_unused_columns=False,
        report_to=settings.report_to if isinstance(settings.report_to, str) else list(settings.report_to),
        disable_tqdm=not sys.stderr.isatty(),
        bf16=settings.bf16,
        # asked for where it is all there is: or the Trainer does not see the other processes, and takes bf16 for a GPU's
        use_cpu=not torch.cuda.is_available() and (distributed.count() > 1 or settings.bf16),
        seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    objective = objective_of(model, tokenizer, settings.mask_fraction)
    at_once, in_a_step = (
        n * arguments.world_size for n in (settings.batch_size, settings.batch_size * settings.accumulation)
    )
    at_last = 0 if longer is None else settings.longer_steps * in_a_step
    examples: Dataset[tuple[Tensor, Tensor]] = Examples(
        blocks, objective, steps * in_a_step - at_last, at_once, settings.seed
    )
    if longer is not None:
        last = Examples(longer, objective, at_last, at_once, settings.seed, first=steps * in_a_step - at_last)
        examples = ConcatDataset([examples, last])
    trainer = MaskedLMTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=_HeldOut(held_out),
        data_collator=lambda examples: collated(objective, examples, tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=[
            Reporting("finetune"),
            *([Annealing(settings.alpha)] if settings.alpha_schedule else []),
            *([Bounded(settings.per_head)] if settings.per_head.any else []),
        ],
    )
    trainer.model_accepts_loss_kwargs = True  # `compute_loss` divides by the tokens of the whole accumulated batch
    trainer.remove_callback(PrinterCallback)
    if arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
    checkpoint = distributed.once(lambda: last_checkpoint(folder))
    if checkpoint is not None:
        log.info("finetune: going on from %s", checkpoint.name)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if not settings.per_head.alpha:
        models.set_normalizer(model, Normalizer(settings.alpha))
    return model


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; one that a kill left half written is removed."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # the Trainer writes it last
            complete.append(path)
        except (OSError, ValueError):
            remove(path)
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class OneDevice(TrainingArguments):
    """One GPU for each process, however many are visible."""

    # with more, the Trainer wraps the model in nn.DataParallel, whose threads would share the hook of `masked_logits`
    @property
    def n_gpu(self) -> int:
        """One GPU at most, however many there are: a process uses one."""
        return min(1, super().n_gpu)


class Examples(Dataset[tuple[Tensor, Tensor]]):
    """Everything that a run will see, in order: example ``j`` is a block, masked by the seed and ``first + j``.

    Each pass over the blocks is shuffled anew. Blocks of like length come together, a batch at a time.
    """

    def __init__(
        self, blocks: TokenBlocks, objective: Objective, count: int, batch_size: int, seed: int, first: int = 0
    ):
        self.blocks, self.objective, self.seed, self.first = blocks, objective, seed, first
        generator = torch.Generator().manual_seed(seed)
        lengths = blocks.lengths
        batches: list[Tensor] = []
        while sum(map(len, batches)) < count:
            shuffled = torch.randperm(len(blocks), generator=generator)
            missing = -len(shuffled) % batch_size  # filled up with the first ones, so that every batch is full
            shuffled = torch.cat([shuffled, shuffled.repeat(missing // len(shuffled) + 1)[:missing]])
            passed: list[Tensor] = []
            for pool in shuffled.split(_POOL * batch_size):
                passed += pool[lengths[pool].argsort(stable=True)].split(batch_size)
            batches += [passed[index] for index in torch.randperm(len(passed), generator=generator).tolist()]
        self.order = torch.cat(batches)[:count].tolist()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.objective(self.blocks[self.order[index]], self.seed, self.first + index)


class _HeldOut(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, batches: Sequence[Batch]):
        self.examples: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            valid = batch["attention_mask"]
            of_labels = batch.get("decoder_attention_mask", valid)
            for row in range(len(valid)):
                self.examples.append((batch["input_ids"][row][valid[row]], batch["labels"][row][of_labels[row]]))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.examples[index]


class MaskedLMTrainer(Trainer):
    """The Trainer, with the head on the tokens asked for only, and without weight decay of what heads learn besides weights."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of the parameters that weight decay pulls to zero."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [name for name in names if LEARNED not in name.split(".")]

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy in nats, averaged over the masked positions of the whole step, in float32."""
        logits, labels = masked_logits(model, inputs)
        total = nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
        processes_ = self.accelerator.num_processes  # the tokens are those of all, and the gradient is their mean
        loss = total / (len(labels) if num_items_in_batch is None else num_items_in_batch / processes_)
        return (loss, {"logits": logits}) if return_outputs else loss


class Reporting(TrainerCallback):
    """The Trainer's numbers as log lines instead of printed dictionaries, each after ``what`` is trained."""

    def __init__(self, what: str):
        self.what = what

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Called by the Trainer with numbers: a line of the losses among them."""
        names = {"loss": "training loss", "eval_loss": "validation loss"}
        figures = [f"{title} {logs[name]:.3f}" for name, title in names.items() if name in (logs or {})]
        if figures:
            log.info("%s: step %d of %d: %s", self.what, state.global_step, state.max_steps, ", ".join(figures))
