"""`mmpretrain evaluate`: a saved model, the evaluators of a config, a JSON of numbers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

from mmpretrain.config import instantiate
from mmpretrain.errors import InputError
from mmpretrain.evaluation import run_evaluators, write_metrics
from mmpretrain.pretrained import load


def evaluate(config: DictConfig) -> dict[str, float]:
    """Evaluate `config.checkpoint` (a model or run folder) and return, and write, the metrics."""
    allow = tuple(config.allow_targets)
    output = Path(config.output)
    if output.exists() and not config.overwrite:
        raise InputError(f"{output} exists; give another output=, or overwrite=true")
    pretrained = load(config.checkpoint, device=config.device, allow=allow)
    if config.prepare is not None:
        instantiate(config.prepare, allow=allow)
    metrics = run_evaluators(pretrained, instantiate(config.evaluators, allow=allow))
    write_metrics(output, metrics)
    print(f"written to {output}", file=sys.stderr)
    if config.json:
        print(json.dumps(metrics, indent=1, sort_keys=True))
    return metrics
