"""Folders that transformers writes, of tiny models with random weights, tokenizer and image processor included."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from mmpretrain.data.tokenizer import BYTE_TO_CHARACTER
from tests.data.photos import photo

PIL: dict[str, Any] = {"backend": "pil"}
"""transformers' torchvision image processors resize with other rounding than PIL."""
TEXTS = [
    "a cat",
    "Two dogs, one red ball!",
    "it's 3 o'clock",
    "a very long text that goes on and on " * 6,
]
KINDS = ("clip", "clip_legacy", "siglip", "siglip2")
SIZES = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2}
CHARACTERS = [chr(byte).translate(BYTE_TO_CHARACTER) for byte in range(256)]


class Theirs(NamedTuple):
    """What transformers computes from pictures and texts: unit vectors, and the ids."""

    image: Tensor
    text: Tensor
    ids: Tensor


def pictures() -> list[Image.Image]:
    """Real pictures, wide and tall."""
    return [photo(97, 64), photo(40, 72, 1), photo(120, 33)]


def saved(folder: Path, kind: str, seed: int = 0, **options: Any) -> Path:
    """Write a tiny model with `save_pretrained`, and what belongs to it."""
    torch.manual_seed(seed)
    model = made(kind)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than their initial values, so that a wrong activation shows
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder, **options)
    tokenizer(kind).save_pretrained(folder)
    processor(kind).save_pretrained(folder)
    return folder


def made(kind: str) -> Any:
    """Build the model."""
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    if kind in ("clip", "clip_legacy"):
        text = {**SIZES, "vocab_size": 514, "max_position_embeddings": 24, "bos_token_id": 512, "pad_token_id": 513}
        text["eos_token_id"] = 2 if kind == "clip_legacy" else 513
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
        return transformers.CLIPModel(config)
    text = {**SIZES, "vocab_size": 300, "max_position_embeddings": 20, "num_attention_heads": 4}
    if kind == "siglip":
        return transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    vision = {**SIZES, "patch_size": 8, "num_patches": 16}
    return transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision))


def tokenizer(kind: str) -> Any:
    """Build a tokenizer of bytes, of the class that such models have."""
    if kind in ("clip", "clip_legacy"):
        words = [*CHARACTERS, *(character + "</w>" for character in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
        vocabulary = {word: i for i, word in enumerate(words)}
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)
    if kind == "siglip2":
        words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(chr(i) for i in range(33, 127))]
        found = transformers.Siglip2Tokenizer(
            vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=20, padding_side="right"
        )
        found._tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=[("<eos>", 1)]
        )
        return found
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["</s>", "<unk>", *CHARACTERS])}, "<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("."), behavior="isolated"),
        ]
    )
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="</s>", unk_token="<unk>", model_max_length=20
    )


def processor(kind: str) -> Any:
    """Build the image processor."""
    if kind == "siglip2":
        return transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=24)
    if kind == "siglip":
        return transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def theirs(folder: Path, images: list[Image.Image], texts: list[str]) -> Theirs:
    """Embed pictures and texts with transformers alone."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    found = transformers.AutoTokenizer.from_pretrained(folder)
    padding = True if model.config.model_type == "clip" else "max_length"
    ids = found(
        texts, padding=padding, truncation=True, max_length=found.model_max_length, return_tensors="pt"
    ).input_ids
    pixels = transformers.AutoImageProcessor.from_pretrained(folder, **PIL)(images=images, return_tensors="pt")
    with torch.no_grad():
        outputs = model(input_ids=ids, **pixels)
    return Theirs(outputs.image_embeds, outputs.text_embeds, ids)
