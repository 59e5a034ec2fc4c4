"""Useful FLOPs of a model against torch's own count of matrix products, where nothing is skipped."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _flops, _models


def counted(name: str, batch: int = 2) -> float:
    config = _models.configuration(name)
    peer = _models.build_peer(config)
    size, text = config["vision_cfg"].get("image_size", 224), config["text_cfg"]
    ids = torch.full((batch, text["context_length"]), text["vocab_size"] - 1)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        peer(torch.zeros(batch, 3, size, size), ids)
    return counter.get_total_flops() / batch


@pytest.mark.parametrize("name", ["tiny", "tiny_coca"])
def test_forward_flops_of_a_full_text_are_what_torch_counts(name):
    length = _models.configuration(name)["text_cfg"]["context_length"]
    assert _flops.forward(_models.configuration(name), length, causal=False) == pytest.approx(counted(name), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "giga"), [("ViT-B-32", 44.3), ("ViT-B-16", 123.3), ("ViT-L-14", 526.0), ("coca_ViT-B-32", 100.0)]
)
def test_training_flops_of_the_real_sizes_are_the_known_ones(name, giga):
    config = _models.configuration(name)
    length = config["text_cfg"]["context_length"]
    assert 3e-9 * _flops.forward(config, length, causal=False) == pytest.approx(giga, rel=0.01)


def test_skipped_padding_does_not_lower_and_computed_padding_does_not_raise_them():
    config = _models.configuration("ViT-B-32")
    assert _flops.useful(config, [16, 8]) == _flops.useful(config, [16]) + _flops.useful(config, [8])
    assert _flops.useful(config, [8]) < _flops.useful(config, [16]) < _flops.useful(config, [77])
