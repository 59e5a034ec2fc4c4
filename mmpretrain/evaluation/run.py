"""Run several evaluators on one model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mmpretrain.evaluation.embed import evaluating
from mmpretrain.evaluation.features import shared_features
from mmpretrain.pretrained import Pretrained

Evaluators = Mapping[str, Callable[[Pretrained], dict[str, float]]]
"""Name -> evaluator."""


def run_evaluators(pretrained: Pretrained, evaluators: Evaluators) -> dict[str, float]:
    """Run every evaluator, each rank taking its share: `<name>/<metric>` -> value, the same on every rank.

    What several of them embed is embedded once (see `shared_features`).
    """
    with evaluating(pretrained.model), shared_features():
        return {f"{n}/{k}": v for n, evaluator in evaluators.items() for k, v in evaluator(pretrained).items()}
