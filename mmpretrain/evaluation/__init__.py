"""Evaluate a pretrained model: zero-shot classification, retrieval and captioning, shared out over ranks.

An evaluator is built from a config and called as `evaluator(pretrained) -> dict[str, float]`.
"""

from mmpretrain.evaluation.captioning import Captioning, exact_match, rouge_l
from mmpretrain.evaluation.confidence import (
    Interval,
    chance_recall,
    class_recall_interval,
    mean_interval,
    wilson,
    write_metrics,
)
from mmpretrain.evaluation.data import ShardCaptions, ShardClassification
from mmpretrain.evaluation.embed import Embedded, embed_images, embed_texts
from mmpretrain.evaluation.retrieval import Retrieval, rank_of_best
from mmpretrain.evaluation.run import Evaluators, run_evaluators
from mmpretrain.evaluation.zero_shot import ZeroShotClassification, class_hits, zero_shot_classifier

__all__ = [
    "Captioning",
    "Embedded",
    "Evaluators",
    "Interval",
    "Retrieval",
    "ShardCaptions",
    "ShardClassification",
    "ZeroShotClassification",
    "chance_recall",
    "class_hits",
    "class_recall_interval",
    "embed_images",
    "embed_texts",
    "exact_match",
    "mean_interval",
    "rank_of_best",
    "rouge_l",
    "run_evaluators",
    "wilson",
    "write_metrics",
    "zero_shot_classifier",
]
