"""What the GPU's training steps are fed with, and the comparison of both sides' gradients that comes first."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import _gpu
from benchmarks._captions import web_lengths


def text_lengths(config: Mapping[str, Any], batch: int, count: int) -> Iterator[list[int]]:
    """Yield the lengths of `count` batches: those of web captions, 16 ids on average, cut to the context length."""
    context = config["text_cfg"]["context_length"]
    for seed in range(count):
        # Quantiles of one distribution for many batches, dealt out: totals differ from batch to batch, as they do.
        generator = random.Random(seed)
        yield [min(context, length) for length in generator.choices(web_lengths(max(batch, 256)), k=batch)]


def inputs(side: str, config: Mapping[str, Any], lengths: list[list[int]], device: torch.device) -> Iterator[Any]:
    """Yield what each side's model takes; the pictures are the same in all batches."""
    from mmpretrain.types import Lengths, Padded

    size, text = config["vision_cfg"].get("image_size", 224), config["text_cfg"]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (len(lengths[0]), 3, size, size), generator=generator, dtype=torch.uint8).to(device)
    images = None if side == "ours" else normalized(pixels)
    for row in lengths:
        ids, mask = texts(row, text["context_length"], text["vocab_size"], generator)
        if images is not None:
            yield images, ids.to(device)
            continue
        longest = max(row)
        padded = Padded(ids[:, :longest].to(device), mask[:, :longest].to(device), Lengths(row))
        yield {"image": Padded(pixels), "text": padded}


def texts(lengths: list[int], context: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ids (B,context), 0 where there is padding and nowhere else, and their mask."""
    ids = torch.randint(1, vocab - 2, (len(lengths), context), generator=generator)
    position, ends = torch.arange(context)[None], torch.tensor(lengths)[:, None]
    ids[:, 0] = vocab - 2
    ids[position == ends - 1] = vocab - 1
    return ids.masked_fill(position >= ends, 0), position < ends


def normalized(pixels: Tensor) -> Tensor:
    """Normalise uint8 pixels as open_clip's transform does, to float32."""
    from mmpretrain.encoders.image import CLIP_MEAN, CLIP_STD

    mean, std = (torch.tensor(values, device=pixels.device).view(-1, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels / 255 - mean) / std


def compare(name: str, batch: int, device: str) -> dict[str, tuple[float, float]]:
    """Compare loss and gradients of both sides with the same weights: float32 with each other, bf16 with float32.

    Returns what was compared -> (difference, largest allowed), differences relative in the Euclidean norm.
    """
    from benchmarks import _models, _open_clip

    place = torch.device(device)
    pair = _models.pair(name, device=place)
    config = _models.configuration(name)
    lengths = list(text_lengths(config, batch, 1))
    ours, peer = next(inputs("ours", config, lengths, place)), next(inputs("peer", config, lengths, place))
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    losses: dict[tuple[str, bool], float] = {}
    gradients: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for exact in (True, False):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32[0] and not exact
        for side, model in (("ours", pair.ours), ("peer", pair.peer)):
            model.zero_grad(set_to_none=True)
            with torch.autocast(place.type, torch.bfloat16, enabled=not exact):
                loss = _models.our_loss(model, ours) if side == "ours" else _models.peer_loss(model, *peer)
            loss.backward()
            found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            losses[side, exact] = loss.item()
            gradients[side, exact] = found if side == "ours" else _open_clip.converted(found, _models.rules(config))
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    reference = gradients["peer", True]
    error = {key: _distance(found, reference) for key, found in gradients.items()}
    allowed = 2 * error["peer", False]
    del pair
    _gpu.release(place)
    return {
        f"{name} float32 loss": (abs(losses["ours", True] - losses["peer", True]) / losses["peer", True], 1e-4),
        f"{name} float32 gradients": (error["ours", True], 1e-3),
        f"{name} bf16 gradients against float32, open_clip's": (error["peer", False], math.inf),
        f"{name} bf16 gradients against float32, ours": (error["ours", False], allowed),
    }


def _distance(found: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    apart = sum(float((found[name].double() - value.double()).square().sum()) for name, value in reference.items())
    return math.sqrt(apart / sum(float(value.double().square().sum()) for value in reference.values()))
