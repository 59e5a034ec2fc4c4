"""One model twice: ours and open_clip's, of the same size, with the same weights, so that both compute one function.

`pair("ViT-B-32")`, also `ViT-B-16`, `ViT-L-14`, `coca_ViT-B-32`, `coca_ViT-L-14`, and any other open_clip configuration
with its own ViT and text tower; `tiny`, `tiny_coca` and
`tiny_vocab` (CLIP's vocabulary) are for tests.

One thing is set on open_clip's CoCa: `text.correct_cls_mask = True`. Its class token else sees one padding position
and not itself, which no code that skips padding can reproduce. That is its own option, in the class but not in its
configuration files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.loss import ClipLoss, CoCaLoss
from torch import Tensor, nn

from benchmarks import _open_clip
from mmpretrain.encoders.image import ImageEncoder, SharedAttentionPool
from mmpretrain.encoders.text import TextEncoder
from mmpretrain.fusion.cross_attention import CrossAttentionFusion
from mmpretrain.heads import CaptionHead
from mmpretrain.interop.names import Entry
from mmpretrain.losses import ContrastiveLoss, PredictionLoss
from mmpretrain.model import MultimodalModel
from mmpretrain.types import Batch

CAPTION_WEIGHT, CONTRASTIVE_WEIGHT = 2.0, 1.0

TINY_VISION = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 32, "head_width": 16}
TINY_TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
TINY: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 16, "vision_cfg": TINY_VISION, "text_cfg": TINY_TEXT},
    "tiny_coca": {
        "embed_dim": 32,
        "vision_cfg": {
            **TINY_VISION,
            "attentional_pool": True,
            "attn_pooler_queries": 5,
            "attn_pooler_heads": 2,
            "output_tokens": True,
        },
        "text_cfg": {**TINY_TEXT, "context_length": 11, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TINY_TEXT, "context_length": 11},
        "custom_text": True,
    },
}
TINY["tiny_vocab"] = {**TINY["tiny"], "text_cfg": {**TINY_TEXT, "vocab_size": 49408}}


class Pair(NamedTuple):
    """Ours and the peer's model, and what a text must look like: up to `context_length` ids, padded with `pad_id` 0.

    The last real id is `eos_id`, the largest of the vocabulary. Ids of real positions must not be 0: open_clip's CoCa
    reads 0 as padding wherever it stands.
    """

    name: str
    ours: MultimodalModel
    peer: nn.Module
    context_length: int
    vocab_size: int
    eos_id: int
    image_size: int
    pad_id: int = 0

    @property
    def captions(self) -> bool:
        """Whether the model also predicts captions (CoCa)."""
        return self.ours.fusion is not None


def pair(name: str, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Pair:
    """Build both, in training mode, with the weights that open_clip draws from `seed`."""
    config = configuration(name)
    made = build_peer(config, seed, device).to(dtype)
    ours = build_ours(config, device).to(dtype)
    ours.load_state_dict(_open_clip.converted(made.state_dict(), rules(config)))
    return described(name, ours, made)


def described(name: str, ours: MultimodalModel, peer: nn.Module) -> Pair:
    """Put two models of one configuration together with what their texts must look like."""
    config = configuration(name)
    text = config["text_cfg"]
    size = config["vision_cfg"].get("image_size", 224)
    return Pair(name, ours, peer, text["context_length"], text["vocab_size"], text["vocab_size"] - 1, size)


def configuration(name: str) -> dict[str, Any]:
    """Return open_clip's configuration of that name, or one of `TINY`."""
    found = TINY.get(name) or open_clip.get_model_config(name)
    if found is None:
        raise SystemExit(f"open_clip has no model {name!r}; see open_clip.list_models()")
    return dict(found)


def rules(config: Mapping[str, Any]) -> list[Entry]:
    """Choose the table of names that fits."""
    if "multimodal_cfg" not in config:
        return _open_clip.CLIP
    return _open_clip.coca(config["vision_cfg"]["width"] == config["embed_dim"])


def build_peer(config: Mapping[str, Any], seed: int = 0, device: torch.device | str = "cpu") -> nn.Module:
    """Build open_clip's model, as its `create_model` does for `precision="amp_bf16"`."""
    torch.manual_seed(seed)
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    with torch.device(device):
        if "multimodal_cfg" not in config:
            return open_clip.CLIP(**arguments, output_dict=True).train()
        made = open_clip.CoCa(**arguments)
        # Its decoder's output embedding is left as allocated (its initialisation is never called).
        nn.init.normal_(made.text_decoder.text_projection, std=made.text_decoder.width**-0.5)
        made.text.correct_cls_mask = True
        return made.train()


def build_ours(config: Mapping[str, Any], device: torch.device | str = "cpu") -> MultimodalModel:
    """Build our model of the size that open_clip's configuration describes."""
    vision, text, embed_dim = config["vision_cfg"], config["text_cfg"], config["embed_dim"]
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    captions = "multimodal_cfg" in config
    with torch.device(device):
        encoders: dict[str, nn.Module] = {
            "image": _image(vision, embed_dim, activation),
            "text": TextEncoder(
                text["vocab_size"],
                text["context_length"],
                text["width"],
                text["layers"],
                text["heads"],
                eos_id=text["vocab_size"] - 1,
                pooling="class_token" if captions else "eos",
                activation=activation,
            ),
        }
        if not captions:
            return MultimodalModel(embed_dim, encoders)
        decoder = config["multimodal_cfg"]
        fusion = CrossAttentionFusion(
            decoder["width"], decoder["layers"], decoder["heads"], context_width=embed_dim, activation=activation
        )
        heads = {"caption": CaptionHead(text["vocab_size"], decoder["width"])}
        return MultimodalModel(embed_dim, encoders, fusion, heads)


def _image(vision: Mapping[str, Any], embed_dim: int, activation: str) -> ImageEncoder:
    width = vision["width"]
    size = {
        "img_size": vision.get("image_size", 224),
        "patch_size": vision["patch_size"],
        "embed_dim": width,
        "depth": vision["layers"],
        "num_heads": width // vision.get("head_width", 64),
        "mlp_ratio": vision.get("mlp_ratio", 4.0),
        "act_layer": activation,
    }
    if not vision.get("attentional_pool"):
        return ImageEncoder("vit_base_patch32_clip_224", size)
    # The pooler reads every token, the class token too, and norms them itself.
    pool = SharedAttentionPool(
        embed_dim, vision.get("attn_pooler_heads", 8), vision.get("attn_pooler_queries", 256), width
    )
    return ImageEncoder("vit_base_patch32_clip_224", {**size, "global_pool": "", "final_norm": False}, pool)


def our_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Compute the loss of ours: contrastive, plus twice the caption loss where there are captions."""
    outputs = model(batch)
    loss: Tensor = CONTRASTIVE_WEIGHT * ContrastiveLoss()(outputs)
    return loss + CAPTION_WEIGHT * PredictionLoss("caption")(outputs) if "caption" in outputs.predictions else loss


def peer_loss(model: nn.Module, images: Tensor, ids: Tensor) -> Tensor:
    """Compute the loss as open_clip's trainer does; normalised float `images` (B,3,H,W), `ids` (B,context_length)."""
    outputs = model(images, ids)
    if "logits" not in outputs:
        return ClipLoss()(outputs["image_features"], outputs["text_features"], outputs["logit_scale"])  # type: ignore[no-any-return]
    loss = CoCaLoss(caption_loss_weight=CAPTION_WEIGHT, clip_loss_weight=CONTRASTIVE_WEIGHT)
    contrastive, caption = loss(**outputs)
    return contrastive + caption  # type: ignore[no-any-return]
