"""Small models of open_clip of every kind, their conversion, and how both are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from mmpretrain import MultimodalModel, Padded
from mmpretrain.config import build_saved
from mmpretrain.interop import converted
from mmpretrain.interop.open_clip_coverage import build
from mmpretrain.interop.open_clip_in import from_config

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TRUNKS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny_siglip": ("vit_base_patch16_siglip_224", VIT),
    "tiny_clip": ("vit_large_patch14_clip_224", VIT),
    "tiny_gap": ("vit_medium_patch16_gap_256", VIT),
    "tiny_relpos": ("vit_relpos_medium_patch16_cls_224", VIT),
    "tiny_eva02": ("eva02_base_patch16_clip_224", VIT),
    "tiny_pe": ("vit_pe_core_tiny_patch16_384", {**VIT, "attn_pool_num_heads": 2, "ref_feat_shape": (4, 4)}),
    "tiny_convnext": ("convnext_base", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "tiny_vitamin": ("vitamin_small_224", {"img_size": 32, "depth": 1}),
    "tiny_mci": ("fastvit_mci0", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 32)}),
    "tiny_swin": (
        "swin_base_patch4_window7_224",
        {"img_size": 56, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)},
    ),
}
"""Name -> the architecture of timm it is, and its sizes: open_clip takes a backbone by name alone."""
WORDS = ["a", "photo", "of", "the", "red", "cat", "dog", "two", "its"]
TEXTS = ["a photo of the red cat", "two", "the dog of a cat, two cats & its red_photo of a red dog and a cat of two"]


def register_trunks() -> None:
    for name, (base, sizes) in TRUNKS.items():
        if not timm.is_model(name):
            timm.models.register_model(_entry(name, base, sizes))


def _entry(name: str, base: str, sizes: Mapping[str, Any]) -> Any:
    def make(pretrained: bool = False, **given: Any) -> nn.Module:
        return timm.model_entrypoint(base)(pretrained, **{**sizes, **given})

    make.__name__ = name
    return make


def filled(model: nn.Module) -> nn.Module:
    """Give CoCa's output embedding values, which open_clip leaves as it is allocated."""
    if (decoder := getattr(model, "text_decoder", None)) is not None:
        nn.init.normal_(decoder.text_projection, std=decoder.width**-0.5)
    return model.eval()


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter and statistic away from values that hide errors: zeros, ones and tiny layer scales."""
    generator = torch.Generator().manual_seed(seed)
    filled(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(0, 0.1, generator=generator)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


class Both(NamedTuple):
    """One model in both libraries, and our config of it."""

    theirs: Any
    ours: MultimodalModel
    made: converted.Converted


def both(config: Mapping[str, Any], tokenizer: Path | None = None, hub: Mapping[str, Any] | None = None) -> Both:
    """Build open_clip's model with random weights, and convert it."""
    torch.manual_seed(0)
    theirs = randomised(build(config, tokenizer or Path(), hub or {}))
    made = from_config(config, theirs.state_dict(), None, tokenizer, "small")
    return Both(theirs, converted.build(made), made)


@torch.no_grad()
def errors(pair: Both, image_size: int, ids: Tensor, texts: Padded) -> tuple[float, float]:
    """Largest difference of embeddings of two pictures and of texts: open_clip's `ids`, and the same as `texts`."""
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    image = pair.theirs.encode_image(images, normalize=True) - pair.ours.embed("image", images)
    text = pair.theirs.encode_text(ids, normalize=True) - pair.ours.embed("text", texts)
    return float(image.abs().max()), float(text.abs().max())


def tokenized(pair: Both, config: Mapping[str, Any], texts: Sequence[str] = TEXTS) -> tuple[Tensor, Padded]:
    """Texts as open_clip's tokenizer of that config gives them, and as ours does."""
    text = config["text_cfg"]
    options, length = dict(text.get("tokenizer_kwargs", {})), text["context_length"]
    name = text.get("hf_tokenizer_name")
    theirs: Any = SimpleTokenizer(context_length=length) if name is None else HFTokenizer(name, length, **options)
    return theirs(list(texts)), build_saved(pair.made.config["tokenizer"])(list(texts))


def word_tokenizer(folder: Path, around: str, specials: Mapping[str, str]) -> Path:
    """Write a tokenizer of a few words that puts `around` (such as `<s> $A </s>`) around a text."""
    vocabulary = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    used = [(word, vocabulary.index(word)) for word in around.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=used)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", **specials}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
