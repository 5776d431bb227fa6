"""What patterns learn, from queries and keys in memory: each artefact by the function that its stage calls."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sparsefinder.attention import Dense
from sparsefinder.errors import UserError
from sparsefinder.experiment.configuration import Learned
from sparsefinder.models import plugged
from sparsefinder.models.observed_attention import Recorder, Watched
from sparsefinder.numerics.normalizers import Normalizer
from sparsefinder.predictors.centroids import Centroids, centroids_of
from sparsefinder.predictors.closed_form import fit_lowrank
from sparsefinder.predictors.fit_centroids import Clustering, KeyClusterSettings, fit_centroids, fit_tree
from sparsefinder.predictors.projections import Projections, projections_of
from sparsefinder.storage.samples import Samples
from sparsefinder.storage.store import progress

RANK = 32  # numbers that queries and keys are compared by
CLUSTERS = 16  # of what is clustered once
FINEST = 256  # clusters of keys on the finest level of their tree: 3 MB of a model with 72 heads
_POINTS = 16_384  # tokens of a layer that are kept in memory and clustered
_ITERATIONS = 25  # of Lloyd's algorithm; more moves nothing that a calibration could see
_OF_TOKENS = ("lowrank", "key_centroids")  # learned from tokens apart: any share of a text will do
_MOST_TEXTS = 50  # that are kept whole, for what is learned from pairs

Kept = Callable[[int], Tensor | slice]
"""How many tokens a text has → which of them are kept."""


def record(model: Any, texts: Iterable[Tensor], dense: Dense, kept: Kept) -> Samples:
    """Queries and keys of some tokens of each text, as the model reads it with its own attention.

    Args:
        model: Of one of `sparsefinder.models.families.TRAITS`.
        texts: Token ids ``(1, n)``.
        dense: The model's own attention.
        kept: Which tokens of a text.

    Returns:
        Samples ``(L, H, n_i, D)`` float32.
    """
    recorder = Recorder()
    sides: tuple[list[Any], list[Any]] = ([], [])
    with plugged(model, Watched(dense, recorder)), torch.inference_mode():
        for ids in texts:
            recorder.layers.clear()
            model.base_model(input_ids=ids.to(model.device), attention_mask=torch.ones_like(ids).to(model.device))
            chosen = kept(ids.shape[1])
            layers = [recorder.layers[layer] for layer in sorted(recorder.layers)]
            for side, name in zip(sides, "qk", strict=True):
                side.append(torch.stack([getattr(qk, name)[0, :, chosen].float().cpu() for qk in layers]))
    return Samples(*sides, source="texts")


def learn(needs: tuple[str, ...], model: Any, texts: list[Tensor], dense: Dense, seed: int) -> Learned:
    """The artefacts that a pattern needs, rounded to half precision where that is fine enough.

    Args:
        needs: Their names.
        model: Of one of `sparsefinder.models.families.TRAITS`.
        texts: Token ids ``(1, n)``.
        dense: The model's own attention. Of a causal one clusters have one level: which of several is taken depends on the
            length of a text, and with it on words that are still to come.
        seed: Of whatever is drawn.

    Raises:
        UserError: For too few tokens, for index heads, and where scikit-learn is not installed.
    """
    if not needs:
        return Learned()
    if "indexer" in needs:
        raise UserError("index heads are not kept in the index of a model: choose another pattern, such as refined")
    if importlib.util.find_spec("sklearn") is None:
        raise UserError("scikit-learn is not installed, with which keys are clustered: pip install 'sparsefinder[fit]'")
    generator = torch.Generator().manual_seed(seed)
    if apart := set(needs) <= {*_OF_TOKENS}:
        share = min(1.0, _POINTS / sum(ids.shape[1] for ids in texts))

        def kept(count: int) -> Tensor | slice:
            return torch.randperm(count, generator=generator)[: max(1, round(share * count))].sort().values
    else:

        def kept(count: int) -> Tensor | slice:
            return slice(None)

        texts = texts[:_MOST_TEXTS]
    samples = record(model, progress(texts, "reading"), dense, kept)
    tokens = sum(samples.lengths)
    clusters = min(CLUSTERS, tokens // 4)
    if clusters < 2:
        raise UserError(f"the texts have {tokens} tokens to learn from, which is too few: give longer ones or more")
    finest = min(FINEST, tokens // 4) if dense.causal else FINEST
    coarsest = finest if dense.causal else min(64, tokens // 4)
    tree = KeyClusterSettings(n_clusters=finest, coarsest=coarsest, max_iterations=_ITERATIONS, seed=seed)
    made: dict[str, Any] = {}
    if apart:
        made["lowrank"] = fit_lowrank(samples, RANK)
        if "key_centroids" in needs:
            made["key_centroids"] = fit_tree(samples, made["lowrank"], tree)
    else:
        clustering = Clustering(n_clusters=clusters, max_iterations=_ITERATIONS, max_points=_POINTS, seed=seed)
        assert isinstance(dense.normalizer, Normalizer)
        made = _of_pairs(needs, samples, clustering, tree, dense.normalizer.alpha if dense.normalizer.sparse else 1.5)
    return Learned({name: rounded(made[name]) for name in needs})


def _of_pairs(
    needs: tuple[str, ...], samples: Samples, clustering: Clustering, tree: KeyClusterSettings, alpha: float
) -> dict[str, Any]:
    """What is learned from gold pairs, and what is learned in that space."""
    training, held_out = samples.split_last_tenth()
    made: dict[str, Any] = {}
    if {"projections", "centroids", "online_centroids"} & {*needs}:
        from sparsefinder.quantization import ProjectSettings, train_projections

        projections = train_projections(
            training, held_out, ProjectSettings(alpha=alpha, seed=clustering.seed)
        ).projections
        made["projections"] = projections
        if "centroids" in needs:
            made["centroids"] = fit_centroids(training, projections, clustering)
        if "online_centroids" in needs:
            from sparsefinder.online_centroids import OnlineSettings, fit_online

            settings = OnlineSettings(n_clusters=clustering.n_clusters, seed=clustering.seed)
            made["online_centroids"] = fit_online(training, projections, settings)
    if {"bilinear_projections", "bilinear_centroids"} & {*needs}:
        from sparsefinder.bilinear import BilinearSettings, train_bilinear

        made["bilinear_projections"] = train_bilinear(
            training, held_out, BilinearSettings(alpha=alpha, seed=clustering.seed)
        ).projections
        made["bilinear_centroids"] = fit_tree(training, made["bilinear_projections"], tree)
    return made


def rounded(artefact: Projections | Centroids) -> Projections | Centroids:
    """The same in numbers that half precision holds, where it holds them: a file is half as large, and equal."""

    def half(x: Any) -> Any:
        if isinstance(x, Tensor):
            near = x.half().float()
            return near if bool(((near - x).abs() <= x.abs() * 1e-3 + 1e-6).all()) else x
        return {name: half(value) for name, value in x.items()} if isinstance(x, dict) else [half(value) for value in x]

    make: Any = centroids_of if isinstance(artefact, Centroids) else projections_of
    made: Projections | Centroids = make(half(artefact.content()), artefact.source)
    return made
