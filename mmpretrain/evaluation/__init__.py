"""Evaluate a pretrained model: zero-shot, probes of its features, retrieval and captioning, shared out over ranks.

An evaluator is built from a config and called as `evaluator(pretrained) -> dict[str, float]`.
"""

from mmpretrain.evaluation.benchmark_data import BenchmarkData
from mmpretrain.evaluation.benchmark_names import benchmark_classes, benchmark_templates
from mmpretrain.evaluation.caption_scores import CiderD, bleu_4, bleu_counts, exact_match, rouge_l
from mmpretrain.evaluation.captioning import Captioning
from mmpretrain.evaluation.choice import CaptionChoice, CaptionPairs
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
from mmpretrain.evaluation.features import image_features, shared_features
from mmpretrain.evaluation.knn import NearestNeighbours
from mmpretrain.evaluation.linear_probe import LinearProbe
from mmpretrain.evaluation.multi_label import mean_average_precision
from mmpretrain.evaluation.retrieval import Retrieval, rank_of_best
from mmpretrain.evaluation.run import Evaluators, run_evaluators
from mmpretrain.evaluation.zero_shot import ZeroShotClassification, class_hits, zero_shot_classifier

__all__ = [
    "BenchmarkData",
    "CaptionChoice",
    "CaptionPairs",
    "Captioning",
    "CiderD",
    "Embedded",
    "Evaluators",
    "Interval",
    "LinearProbe",
    "NearestNeighbours",
    "Retrieval",
    "ShardCaptions",
    "ShardClassification",
    "ZeroShotClassification",
    "benchmark_classes",
    "benchmark_templates",
    "bleu_4",
    "bleu_counts",
    "chance_recall",
    "class_hits",
    "class_recall_interval",
    "embed_images",
    "embed_texts",
    "exact_match",
    "image_features",
    "mean_average_precision",
    "mean_interval",
    "rank_of_best",
    "rouge_l",
    "run_evaluators",
    "shared_features",
    "wilson",
    "write_metrics",
    "zero_shot_classifier",
]
