"""Tiny CLIPs of open_clip in OpenAI's layouts, with weights large enough that every part of them matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CONTEXT, VOCAB, EMBED = 16, 49_408, 48
SIZES = {
    "vit": {"layers": 2, "width": 128, "patch_size": 8, "image_size": 32},
    "resnet": {"layers": (1, 2, 1, 1), "width": 16, "patch_size": None, "image_size": 64},
}

EXTRAS = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(49408)}
"""Sizes that OpenAI's files hold beside the weights; by them, or by half precision, they are known."""


def released(model: nn.Module) -> dict[str, Tensor]:
    """Weights as in a file of OpenAI's."""
    return {**model.state_dict(), **EXTRAS}


def tiny_clip(kind: str, seed: int = 0, quick_gelu: bool = True) -> Any:
    """A CLIP with OpenAI's activation, in evaluation mode."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    torch.manual_seed(seed)
    text = CLIPTextCfg(context_length=CONTEXT, vocab_size=VOCAB, width=64, heads=1, layers=2)
    model = CLIP(EMBED, CLIPVisionCfg(**SIZES[kind]), text, quick_gelu=quick_gelu)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.8, 1.2)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_(std=0.1)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
                module.bias.normal_(std=0.1)
    return model.eval()


def embeddings(model: nn.Module, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of open_clip's model, in float32."""
    with torch.no_grad():
        return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)
