"""What was learned for one model: projections, centroids, curves, and how to run them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefinder.attention import Bucketed, Dense, Masked
from sparsefinder.auto_attention import Auto
from sparsefinder.errors import UserError
from sparsefinder.executors.choose_executor import AUTO
from sparsefinder.experiment.configuration import Configuration, Dials, Learned
from sparsefinder.graphs import Attention
from sparsefinder.models.entmax_configuration import TEMPERATURE
from sparsefinder.models.families import DECODERS
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.predictors.centroids import load_centroids
from sparsefinder.predictors.projections import load_projections
from sparsefinder.sparse_model.curves import Curves, Target
from sparsefinder.sparse_model.named_patterns import named_pattern

Values = tuple[tuple[float, ...], ...]
"""Of the sparsity parameter, for each layer and head."""


@dataclass(frozen=True)
class BaseModel:
    """The model that an index was learned for.

    Args:
        name: Its folder, or its name on the hub.
        family: Its ``model_type``.
        content: Hash of its weights, see `hash_of_weights`; empty where it is not known.
        layers: Attention layers that are replaced.
        heads: Of each.
        head_size: Of each.
        alpha: Of its entmax; 1 is softmax.
    """

    name: str
    family: str
    content: str
    layers: int
    heads: int
    head_size: int
    alpha: float

    @property
    def causal(self) -> bool:
        """Whether it is a decoder, of which no query sees a later key."""
        return self.family in DECODERS


@dataclass(frozen=True)
class Attached:
    """How an index is run in a model.

    Args:
        target: What the values were chosen for, such as ``density=0.1``; None for the pattern's own setting.
        values: Of the sparsity parameter, for each layer and head; None for the pattern's own.
        auto: Whether dense attention is used below the length at which the prediction pays.
        executor: What multiplies: see `sparsefinder.attention.Bucketed`.
    """

    target: str | None = None
    values: Values | None = None
    auto: bool = True
    executor: str = AUTO

    def dialled(self, configuration: Configuration) -> Configuration:
        """A configuration with these values."""
        if self.values is None:
            return configuration
        return replace(configuration, dials=Dials(self.target or "given", self.values))


@dataclass(frozen=True)
class Index:
    """What `sparsefinder.fit` learned, ready for `sparsefinder.attach`.

    Args:
        base: The model that it belongs to.
        configuration: The pattern and what it is united with, without what was learned.
        learned: Projections and centroids, by name.
        curves: What values of the sparsity parameter give each head; None where nothing was measured.
        quality: Rows of what the whole model gave on held-out texts, one for each density that was tried: ``density``,
            ``difference`` (1 − the cosine of the pooled output to the dense one) and ``tokens``.
        facts: How it was learned: texts, tokens, seed, seconds, versions.
        attached: How it was run in the model that it was saved with; None for an index that was saved alone.
        saved_with: Hash of the weights that it was saved beside, where these were trained after it was learned.
    """

    base: BaseModel
    configuration: Configuration = field(repr=False)
    learned: Learned = field(repr=False)
    curves: Curves | None = field(default=None, repr=False)
    quality: tuple[Mapping[str, float], ...] = field(default=(), repr=False)
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)
    attached: Attached | None = None
    saved_with: str = ""

    def __str__(self) -> str:
        base = self.base
        shape = f"{base.layers} layers × {base.heads} heads × {base.head_size}"
        lines = [f"{self.configuration.label}, learned for {base.name or 'an unnamed model'} ({base.family}, {shape})"]
        if self.quality:
            lines += ["density  recall  difference to the dense model"]
            lines += [f"{r['measured_density']:7.3f}  {r['recall']:6.3f}  {r['difference']:.2g}" for r in self.quality]
        return "\n".join(lines)

    @property
    def normalizer(self) -> Normalizer:
        """That of the model."""
        return Normalizer(self.base.alpha)

    @property
    def dense(self) -> Dense:
        """The model's own attention."""
        return Dense(self.normalizer, self.base.causal)

    def setting(self, target: Target | None, auto: bool, executor: str) -> Attached:
        """The values of the sparsity parameter for a target.

        Raises:
            UserError: The index has no curves, or nothing tells the loss.
        """
        if target is None:
            return Attached(None, None, auto, executor)
        if self.curves is None:
            raise UserError(
                f"{target}: this index of {self.configuration.name} holds no measured curves to choose by: attach it without "
                "density, recall and loss_tolerance, or learn one with sparsefinder.fit"
            )
        wanted = self._density_for(target) if target.measure == "loss_tolerance" else target
        return Attached(str(target), self.curves.choose(wanted), auto, executor)

    def _density_for(self, target: Target) -> Target:
        """The smallest density that was tried, and those above it, whose difference is within the tolerance."""
        tried = sorted(self.quality, key=lambda row: -row["density"])
        enough = None
        for row in tried:
            if row["difference"] > target.value:
                break
            enough = row["density"]
        if enough is None:
            best = min((row["difference"] for row in tried), default=float("nan"))
            raise UserError(
                f"{target}: the least difference that was measured is {best:.2g}; give a larger tolerance, or a density"
            )
        return Target("density", enough)

    def attention(self, setting: Attached) -> Attention:
        """What is plugged into the model.

        With `auto` only where the pattern has a bucketed form: compared with every key it never pays.
        """
        configuration = setting.dialled(self.configuration)
        pattern = configuration.build(self.learned)
        if configuration.bucketed(self.learned, self.base.head_size):
            if setting.auto:
                return Auto(pattern, self.normalizer, self.base.causal, setting.executor)
            return Bucketed(pattern, self.normalizer, self.base.causal, setting.executor)
        return Masked(pattern, self.normalizer, self.base.causal)

    def save(self, folder: Path | str) -> None:
        """Write ``sparsefinder.json`` and ``sparsefinder.safetensors`` into a folder, which is made where it is missing."""
        from sparsefinder.sparse_model.index_files import write

        write(self, Path(folder))

    @classmethod
    def load(cls, folder: Path | str) -> Index:
        """Read what `save` wrote, alone or beside a model. Raises `UserError` for a folder without, cut or altered files."""
        from sparsefinder.sparse_model.index_files import read

        if not isinstance(folder, (str, Path)) or not Path(folder).is_dir():
            raise UserError(f"Index.load needs the folder that Index.save or save_pretrained wrote, {folder!r} is none")
        return read(Path(folder))

    @classmethod
    def from_published(
        cls,
        projections: Path | str,
        centroids: Path | str,
        *,
        window: int | None = None,
        top_clusters: int = 1,
        alpha: float = 1.5,
        base_model: str = "",
        family: str = "",
    ) -> Index:
        """An index of the published Sparsefinder's two files: tokens that share a near centroid, united with a window.

        Args:
            projections: ``projections.pickle``.
            centroids: ``centroids.pickle``.
            window: Odd; None for no window.
            top_clusters: Centroids that a token belongs to.
            alpha: Of the model's entmax; 1 for softmax.
            base_model: Its name, for the card.
            family: Its ``model_type``; empty for any.

        Returns:
            An index that fits any model with these layers, heads and head size.

        Raises:
            UserError: For files that cannot be read or do not belong together.
        """
        learned = Learned({"projections": load_projections(projections), "centroids": load_centroids(centroids)})
        pattern = replace(named_pattern("kmeans", alpha, 0).pattern, top_clusters=top_clusters)
        found, clusters = learned.artefacts["projections"], learned.artefacts["centroids"]
        layers = found.layers
        weight = next(iter(layers[0].q.parameters()), None)
        if weight is None:
            heads, _, _, size = clusters.layers[0].shape
        else:
            heads, size = weight.shape[0], layers[0].q.in_size
        ours, theirs = (len(layers), heads, found.size or size), (len(clusters.layers), *clusters.layers[0].shape[::3])
        if ours != theirs:
            raise UserError(
                f"{projections} has {ours[0]} layers of {ours[1]} heads with {ours[2]} numbers, {centroids} has {theirs[0]} of "
                f"{theirs[1]} with {theirs[2]}: give two files of one model"
            )
        base = BaseModel(base_model, family, "", len(layers), heads, size, alpha)
        return cls(base, Configuration("kmeans", pattern, window=window), learned, facts={"source": "published files"})


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of the weights that decide about queries and keys, as bfloat16: the same in float32 and in bfloat16.

    Without the pooler, which not every head has, and without the table of positions, which may be lengthened. With the
    temperature of the heads, where they have learned one: it multiplies queries.

    Args:
        model: Without its head.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if not name.startswith("pooler.") and "position_embeddings" not in name:
            digest.update(name.encode())
            digest.update(_bytes(weight))
    if temperature := getattr(getattr(model, "config", None), TEMPERATURE, None):
        digest.update(json.dumps(temperature, sort_keys=True).encode())
    return digest.hexdigest()


def _bytes(weight: Tensor) -> bytes:
    rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
    return rounded.view(torch.int16).numpy().tobytes()
