"""Stage ``finetune``: a language model whose attention is truly sparse.

A model that starts from nothing (`NewModel`) or a pretrained one (`Pretrained`) is trained under α-entmax, an encoder on the
words behind masks, a decoder on the next word and an encoder-decoder on damaged texts, by the Trainer of transformers: either
with every softmax replaced at once, or with α annealed from 1.01 to its end value over the first half of the steps
(``alpha_schedule``). ``steps=0`` takes the model as it is and only changes its attention. With ``attention`` the steps, and the
looks at the validation loss between them, run on the graph that a pattern predicts, with what it learned in another run: long
blocks are trained on without multiplying every pair.

Several processes (`sparsefinder.storage.distributed`) train together; each takes ``batch_size`` blocks of a step, so that two
of them with half the batch do what one does with the whole, but for the order of its sums.

A killed run goes on from its last complete checkpoint and ends with the weights it would have had: what is read and masked
at a step depends on the seed and the step alone, and the Trainer restores the state of everything else
(`sparsefinder.models.trainer`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from sparsefinder import models
from sparsefinder.conversions.lengthen import lengthen
from sparsefinder.corpora import Corpus, TokenBlocks, block_length, token_blocks, train_tokenizer
from sparsefinder.errors import UserError, check_counts, one_of
from sparsefinder.evaluation.arms import Arm, plugged
from sparsefinder.experiment.configuration import Learned
from sparsefinder.models.documents_apart import read_apart
from sparsefinder.models.families import TRAITS, Kind, kind_of
from sparsefinder.models.learned_heads import get_heads, learned_heads
from sparsefinder.models.masked_lm import gold_sparsity, loss_without_source, unigram_entropy, validation_loss
from sparsefinder.models.objectives import asked_batches
from sparsefinder.models.position_tables import CONVENTIONS, longest_input, reserved_rows
from sparsefinder.models.setting_names import SHARE_KEYS, in_words_of
from sparsefinder.models.statistical_init import from_statistics
from sparsefinder.models.trackers import check_trackers
from sparsefinder.models.trainer import TrainingSettings, train
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.storage import distributed
from sparsefinder.storage.files import remove
from sparsefinder.storage.manifests import PRETRAINED, content_hash, plain
from sparsefinder.storage.store import ARTEFACTS, Store

log = logging.getLogger(__name__)

STARTS = ("random", "statistics")
SCHEDULES = ("linear", "cosine", "constant_with_warmup")
_SPARSITY_BATCHES = 4  # validation batches on which the mean gold sparsity is measured
_LOCAL = ("global_every", "local_window")  # settings of layers that do not attend to all tokens
_AUTO: dict[Kind, Any] = {
    "encoder": AutoModelForMaskedLM,
    "decoder": AutoModelForCausalLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
}


@dataclass(frozen=True)
class NewModel:
    """A model of one of `sparsefinder.models.families.TRAITS` with random weights, and a vocabulary of the training part."""

    family: str = "roberta"
    vocabulary_size: int = 6000  # tokens, special ones included
    max_length: int = 256  # tokens of input, special ones included
    layers: int = 4  # of an encoder-decoder, in each of the two
    heads: int = 4
    key_heads: int | None = (
        None  # of keys and values in decoders that share them (llama and its kin); null: as many as heads
    )
    hidden_size: int = 128
    intermediate_size: int = 512
    dropout: float = 0.0  # of hidden states and attention; a small model on much text needs none
    initializer_range: float = 0.02
    # of modernbert, whose positions are relative: one layer of so many attends to all tokens, the others through a window (3 is
    # what was published); of the other families every layer does
    global_every: int = 1
    local_window: int = 128  # tokens of that window
    # or statistics: frequencies and word vectors are counted first, see `sparsefinder.models.statistical_init`
    start: str = "random"

    def __post_init__(self) -> None:
        families = [name for name in TRAITS if name != "lfm2"]  # hybrids are others' to train
        if self.family not in families:
            raise UserError(f"model.family={self.family} is unknown; {one_of(families, self.family)}")
        key_heads = self.heads if self.key_heads is None else self.key_heads
        if key_heads < 1 or self.heads % key_heads:
            raise UserError(f"model.heads={self.heads} is not a multiple of model.key_heads={self.key_heads}")
        if key_heads < self.heads and self.family not in SHARE_KEYS:
            raise UserError(
                f"model.key_heads={self.key_heads}, but heads of a {self.family} do not share keys: leave it out, or choose "
                f"{', '.join(SHARE_KEYS)}"
            )
        sizes = ("vocabulary_size", "max_length", "layers", "heads", "hidden_size", "intermediate_size")
        check_counts("model", self, *sizes, *_LOCAL)
        if self.start not in STARTS:
            raise UserError(f"model.start={self.start} is unknown; {one_of(STARTS, self.start)}")
        if self.hidden_size % self.heads:
            raise UserError(f"model.hidden_size={self.hidden_size} is not a multiple of model.heads={self.heads}")
        if self.global_every > 1 and self.family != "modernbert":
            raise UserError(
                f"model.global_every={self.global_every}, but every layer of a {self.family} attends to all tokens: give 1, or "
                "model.family=modernbert"
            )

    def make(self, corpus: Corpus, cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, from the random state of the moment, and its tokenizer."""
        tokenizer = train_tokenizer(corpus.documents("train", cache), self.vocabulary_size, self.max_length)
        convention = CONVENTIONS[self.family]  # the configuration of BART's kin counts tokens alone
        reserved = reserved_rows(convention, tokenizer.pad_token_id) if convention == "after_padding" else 0
        settings = {
            "vocab_size": len(tokenizer),
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_length + reserved,
            "type_vocab_size": 1,
            "hidden_dropout_prob": self.dropout,
            "attention_probs_dropout_prob": self.dropout,
            "initializer_range": self.initializer_range,
            "layer_norm_eps": 1e-5,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        if self.family in SHARE_KEYS:
            settings |= {"num_key_value_heads": self.key_heads or self.heads, "sliding_window": None}
            settings |= {"head_dim": self.hidden_size // self.heads}
        if self.family == "t5":
            settings |= {"d_kv": self.hidden_size // self.heads}
        if TRAITS[self.family].kind == "encoder_decoder":
            # what BART generates ends so, at the longest length; words as long as the sines of Pegasus' and Marian's positions
            settings |= {"forced_eos_token_id": None, "scale_embedding": CONVENTIONS[self.family] == "sinusoidal"}
        if self.family == "modernbert":
            kinds = [
                "sliding_attention" if depth % self.global_every else "full_attention" for depth in range(self.layers)
            ]
            settings |= {"layer_types": kinds, "local_attention": self.local_window}
        config = AutoConfig.for_model(self.family, **in_words_of(self.family, settings))
        model = _AUTO[TRAITS[self.family].kind].from_config(config)
        if self.start == "statistics":
            blocks = token_blocks(corpus, tokenizer, "train", self.max_length, cache=cache)
            from_statistics(model, blocks, tokenizer.all_special_ids)
        return model, tokenizer


@dataclass(frozen=True)
class Pretrained:
    """A folder written by ``save_pretrained`` or a name on the Hugging Face hub."""

    name_or_path: str
    max_length: int | None = None  # tokens of input that it is lengthened to, special ones included; None: as it is

    def make(self, corpus: Corpus, cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model and its tokenizer; nothing is learned from ``corpus``."""
        model, tokenizer = models.load_language_model(self.name_or_path)
        if self.max_length is not None:
            certificate = lengthen(model, tokenizer, self.max_length)
            passed = "; ".join(check.name for check in certificate.checks)
            log.info("finetune: lengthened to %d tokens, its certificate passed (%s)", self.max_length, passed)
        return model, tokenizer

    @property
    def inputs(self) -> dict[str, str]:
        """A hash of the files of a folder; a model of the hub is known by its name."""
        folder = Path(self.name_or_path)
        if not folder.is_dir():
            return {}
        try:  # folders inside are not read: they may be checkpoints, or the run directory itself
            files = {file.name: content_hash(file) for file in folder.iterdir() if file.is_file()}
        except OSError as error:
            raise UserError(f"model={folder} cannot be read: {error.strerror} ({error.filename})") from error
        return {PRETRAINED: hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()}


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(TrainingSettings):
    """What is trained, on what, and how."""

    corpus: Corpus
    model: NewModel | Pretrained
    length: int | None = None  # tokens of a block; None: what the model can take
    longer_length: int | None = None  # tokens of a block in the last `longer_steps`; None: what the model can take
    steps: int | None = 3000  # updates; 0 takes the model as it is; None where epochs are counted
    epochs: float | None = None  # times that the text is read, instead of steps
    eval_blocks: int = 200  # blocks of the validation part that the loss is taken on
    # attended with while training, an entry as of `arms`: {pattern: refined, level: 2.5}; None: the model's own, dense
    attention: Arm | None = None
    learned: str | None = None  # the run directory in which the pattern of `attention` has learned what it needs

    def __post_init__(self) -> None:
        self._check_attention()
        check_counts("finetune", self, "batch_size", "accumulation", "eval_steps", "eval_blocks")
        for name in ("steps", "warmup", "weight_decay", "longer_steps"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"finetune.{name} must not be negative, got {getattr(self, name)}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise UserError(f"finetune.epochs must be positive, or null to count steps, got {self.epochs}")
        if (self.steps is None) == (self.epochs is None):
            raise UserError(
                f"finetune.steps={self.steps} and finetune.epochs={self.epochs}: one of them says how long to train; set the "
                "other to null"
            )
        if self.longer_steps and self.longer_steps >= (self.steps or 0):
            raise UserError(
                f"finetune.longer_steps={self.longer_steps} are the last of finetune.steps={self.steps}: give fewer, and steps "
                "instead of epochs"
            )
        for name in ("learning_rate", "clip", "adam_epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"finetune.{name} must be positive, got {getattr(self, name)}")
        if not 1.0 <= self.alpha <= 2.0:
            raise UserError(f"finetune.alpha must lie between 1 (softmax) and 2 (sparsemax), got {self.alpha}")
        low, high = self.per_head.alpha_bounds
        if self.per_head.alpha and not low <= self.alpha <= high:
            raise UserError(f"finetune.alpha={self.alpha} must lie within finetune.per_head.alpha_bounds={[low, high]}")
        if self.per_head.alpha and (self.alpha_schedule or self.attention is not None):
            other = "finetune.alpha_schedule" if self.alpha_schedule else "finetune.attention"
            raise UserError(
                f"finetune.per_head.alpha learns an α for each head, and {other} needs one for all: leave one out"
            )
        if not 0.0 < self.mask_fraction < 1.0:
            raise UserError(f"finetune.mask_fraction must lie between 0 and 1, got {self.mask_fraction}")
        if self.schedule not in SCHEDULES:
            raise UserError(f"finetune.schedule={self.schedule} is unknown; {one_of(SCHEDULES, self.schedule)}")
        if not isinstance(self.report_to, str):
            object.__setattr__(self, "report_to", tuple(self.report_to))
        check_trackers("finetune.report_to", self.report_to)

    def _check_attention(self) -> None:
        if self.attention is None:
            if self.learned is not None:
                raise UserError("finetune.learned is for the pattern of finetune.attention: give both, or neither")
            return
        if self.attention.reading is not None:
            raise UserError(
                "finetune.attention takes a pattern or an attention, with its settings; a reading is for arms"
            )
        if self.alpha_schedule:
            raise UserError(
                "finetune.alpha_schedule anneals the model's own attention: leave it out, or finetune.attention"
            )
        if needs := self.attention.needs:
            if self.learned is None:
                raise UserError(
                    f"finetune.attention={self.attention.name} works with {' and '.join(needs)}: finetune.learned=RUN_DIR "
                    "names the run that made them"
                )
            if not Path(self.learned).is_dir():
                raise UserError(f"finetune.learned={self.learned} is no folder: give the directory of a finished run")

    @property
    def needs(self) -> tuple[str, ...]:
        """Artefacts read by the stage: none."""
        return ()

    @property
    def inputs(self) -> dict[str, str]:
        """What else the result depends on, by content."""
        given = self.model.inputs if isinstance(self.model, Pretrained) else {}
        learned = {}
        if self.attention is not None and self.learned is not None:
            other = Store(self.learned)
            learned = {f"learned_{name}": other.content(name) for name in self.attention.needs}
        return {"corpus": self.corpus.fingerprint(), **given, **learned}


def run(settings: FinetuneSettings, store: Store) -> None:
    """Make ``model``, and note its validation loss, the unigram entropy of the same tokens, and its gold sparsity."""
    began = time.monotonic()
    ours = {path.resolve() for path in (store.run_dir, store.run_dir / ARTEFACTS["model"].path)}
    if isinstance(settings.model, Pretrained) and Path(settings.model.name_or_path).resolve() in ours:
        raise UserError(f"model={settings.model.name_or_path} is what this stage writes: choose another run_dir=PATH")
    cache = store.scratch("corpus")
    model, tokenizer = distributed.first_then_all(lambda: _made(settings, cache))
    read_apart(model, tokenizer, settings.corpus)
    length = block_length(settings.length, longest_input(model.config), "finetune.length")
    validation = distributed.first_then_all(
        lambda: token_blocks(settings.corpus, tokenizer, "validation", length, settings.eval_blocks, cache)
    )
    held_out = asked_batches(model, validation, tokenizer, seed=settings.seed, batch_size=settings.batch_size)
    if not (settings.per_head.alpha and get_heads(model).alpha is not None):  # those of its heads are learned on
        models.set_normalizer(model, Normalizer(settings.alpha))
    steps = 0
    if settings.steps != 0:
        training = distributed.first_then_all(
            lambda: token_blocks(settings.corpus, tokenizer, "train", length, cache=cache)
        )
        steps = steps_over(settings, len(training))
        longer = _longer_blocks(settings, model, tokenizer, cache)
        checkpoints = distributed.once(lambda: _checkpoints(settings, store))
        with learned_heads(model, settings.per_head), _attending(settings, model):
            model = train(settings, steps, model, tokenizer, training, held_out, checkpoints, longer)
    if not distributed.first():
        return
    loss, entropy = validation_loss(model, held_out), unigram_entropy(held_out)
    sparsity = gold_sparsity(model, held_out[:_SPARSITY_BATCHES])
    reads = kind_of(model.config) == "encoder_decoder"
    without = {"loss_without_source": loss_without_source(model, held_out)} if reads else {}
    with store.writing("model") as folder:
        model.save_pretrained(folder)
        _save(tokenizer, folder)
    remove(store.scratch("finetune"))
    seconds = time.monotonic() - began
    store.note(
        "model",
        validation_loss=loss,
        unigram_entropy=entropy,
        gold_sparsity=sparsity,
        **without,
        steps=steps,
        parameters=model.num_parameters(),
        seconds=round(seconds, 1),
    )
    log.info(
        "finetune: %d steps, %.0f s; validation loss %.3f, unigram entropy %.3f: %.3f nats below; mean gold sparsity %.3f",
        *(steps, seconds, loss, entropy, entropy - loss, sparsity),
    )
    for blind in without.values():
        log.info(
            "finetune: without a look at the text that it repairs it loses %.3f: %.3f nats more", blind, blind - loss
        )


def _attending(settings: FinetuneSettings, model: Any) -> AbstractContextManager[None]:
    """The attention that the model is trained under, plugged in for a while; none where that is its own."""
    arm = settings.attention
    if arm is None:
        return contextlib.nullcontext()
    shape = models.describe(model)
    learned = Learned() if settings.learned is None else Learned.load(Store(settings.learned), arm.needs)
    learned.check(shape.layers, shape.heads, shape.head_size)
    log.info("finetune: attends with %s while training, and densely where it is measured at the end", arm.name)
    return plugged(model, arm, arm.build(learned, Normalizer(settings.alpha)))


def _longer_blocks(settings: FinetuneSettings, model: Any, tokenizer: Any, cache: Path) -> TokenBlocks | None:
    """What the last steps read; None where they read what the others do."""
    if not settings.longer_steps:
        return None
    length = block_length(settings.longer_length, longest_input(model.config), "finetune.longer_length")
    return distributed.first_then_all(lambda: token_blocks(settings.corpus, tokenizer, "train", length, cache=cache))


def steps_over(settings: FinetuneSettings, blocks: int) -> int:
    """How many steps are to be made over so many blocks; of an epoch's last step, begun counts as made."""
    if settings.steps is not None:
        return settings.steps
    in_a_step = settings.batch_size * settings.accumulation * distributed.count()
    return math.ceil((settings.epochs or 0) * blocks / in_a_step)


def _made(settings: FinetuneSettings, cache: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    set_seed(settings.seed)
    return settings.model.make(settings.corpus, cache)


def _save(tokenizer: Any, folder: Path) -> None:
    """The tokenizer without the truncation that it was last called with, if at all: blocks may have come from a cache."""
    backend = getattr(tokenizer, "backend_tokenizer", None)  # tokenizers in Python have none, and forget by themselves
    if backend is not None:
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)


def _checkpoints(settings: FinetuneSettings, store: Store) -> Path:
    """A folder that belongs to these settings, text and given weights; checkpoints of others are of no use and go."""
    scratch = store.scratch("finetune")
    identity = json.dumps([plain(settings), settings.inputs], sort_keys=True, default=str)
    folder = scratch / hashlib.sha256(identity.encode()).hexdigest()[:16]
    for other in scratch.iterdir():
        if other != folder:
            remove(other)
    folder.mkdir(exist_ok=True)
    return folder
