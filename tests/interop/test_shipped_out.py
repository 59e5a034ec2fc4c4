"""Which shipped models transformers and open_clip can hold, and what each of the others has that they lack."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate
from mmpretrain.errors import InputError
from mmpretrain.interop import huggingface_describe, open_clip_describe

HELD = ""
SHIPPED = {
    "clip_tiny": ("a norm before its blocks", HELD),
    "clip_vit_b32": (HELD, HELD),
    "clip_vit_b16": (HELD, HELD),
    "clip_rn50": ("ByobNet", HELD),
    "clip_convnext_base": ("ConvNeXt", HELD),
    "siglip_tiny": (HELD, "model_args"),
    "siglip_vit_b16": (HELD, "'act_layer': 'gelu_tanh'"),
    "coca_tiny": ("a fusion", "CascadedAttentionPool"),
    "coca_vit_b32": ("a fusion", "CascadedAttentionPool"),
}
"""Model -> what transformers and open_clip lack for it."""


def model(name: str) -> tuple[Any, dict[str, Any]]:
    register_resolvers()
    tokenizer = {"siglip": "siglip", "coca": "coca"}.get(name.split("_")[0], "clip")
    with initialize_config_module("mmpretrain.configs", version_base="1.3"), torch.device("meta"):
        choices = ["experiment=image_text_clip", f"model={name}", f"tokenizer={tokenizer}", "data.image_size=224"]
        composed = compose("train", choices)
        config: Any = OmegaConf.to_container(composed.model, resolve=True)
        return instantiate(composed.model), config["encoders"]["image"]


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_model_is_held_or_what_is_lacking_is_named(name: str) -> None:
    built, stated = model(name)
    for describe, lacking in (
        (lambda: huggingface_describe.describe(built, 49406, 0).config, SHIPPED[name][0]),
        (lambda: open_clip_describe.describe(built, stated, 224), SHIPPED[name][1]),
    ):
        if lacking == HELD:
            assert describe()
        else:
            with pytest.raises(InputError, match=lacking):
                describe()
