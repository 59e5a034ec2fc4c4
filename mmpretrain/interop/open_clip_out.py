"""Out: a folder that open_clip loads, as `open_clip.create_model_and_transforms("local-dir:OUT")`, checked with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.tokenizer import ClipTokenizer, HuggingFaceTokenizer
from mmpretrain.errors import InputError
from mmpretrain.interop import open_clip_config
from mmpretrain.interop.huggingface_tokenizer_out import write_tokenizer
from mmpretrain.interop.names import to_theirs
from mmpretrain.interop.open_clip_describe import Config, describe
from mmpretrain.interop.open_clip_in import CONFIG, RESIZE
from mmpretrain.interop.open_clip_names import BACKBONE
from mmpretrain.interop.out_folder import needed, new_folder
from mmpretrain.interop.parity import Parity, check
from mmpretrain.interop.samples import Samples, batched, normalized, read_files, samples
from mmpretrain.interop.towers import normalization, stated_image
from mmpretrain.pretrained import Pretrained, load
from mmpretrain.types import Padded

WEIGHTS = "open_clip_model.safetensors"
CLEANED = ("whitespace", "lower", "canonicalize")
"""What open_clip can do to a text before a tokenizer.json reads it; it always does one of them."""


def export(folder: str | Path, out: str | Path, tolerance: float = 1e-5, allow: Sequence[str] = ()) -> Parity:
    """Write a model folder as one of open_clip: `open_clip_config.json`, weights, tokenizer files, and `parity.json`.

    open_clip loads the result and is compared with the model: pixels, token ids, embeddings, and CoCa's captions.
    Raises `InputError` without open_clip, for a part it does not have, and beyond `tolerance`.
    """
    open_clip = needed("open_clip", "open_clip")
    pretrained = load(folder, allow=allow)
    stated = stated_image(folder)
    size = getattr(pretrained.preprocess, "image_size", 0)  # what has none is refused, there or below
    config = describe(pretrained.model, stated, size)
    mean, std = normalization(pretrained.model.encoders["image"], stated)
    preprocess = _preprocess(pretrained.preprocess, mean, std)
    with new_folder(out, "open_clip") as temporary:
        _write_tokenizer(pretrained, temporary, config["text_cfg"])
        content = {"model_cfg": config, "preprocess_cfg": preprocess}
        (temporary / CONFIG).write_text(json.dumps(content, indent=1), encoding="utf-8")
        _write_weights(pretrained, temporary / WEIGHTS, config)
        given = samples(pretrained.preprocess)
        outputs, transform = _compare(open_clip, temporary, pretrained, given, normalized(given.pictures, mean, std))
        files = read_files(
            given,
            transform,
            lambda image: normalized([pretrained.preprocess(image)], mean, std)[0],
            same=pretrained.preprocess.read == "stored",
        )
        packages = ["open_clip_torch"]
        found = check(outputs | files.outputs, tolerance, given.described(), "open_clip", packages, files.notes)
        found.write(temporary)
    return found


def _preprocess(preprocess: Any, mean: list[float], std: list[float]) -> Config:
    if not isinstance(preprocess, Preprocess):
        raise InputError(f"open_clip has no {type(preprocess).__name__}; the model cannot be written for it")
    return {
        "size": preprocess.image_size,
        "mode": "RGB",
        "mean": mean,
        "std": std,
        "interpolation": preprocess.interpolation,
        "resize_mode": next(theirs for theirs, ours in RESIZE.items() if ours == preprocess.resize),
        "fill_color": preprocess.fill,
    }


def _write_tokenizer(pretrained: Pretrained, out: Path, text: Config) -> None:
    """Write tokenizer files, and say in `text_cfg` that they are there, unless the tokenizer is open_clip's own."""
    tokenizer: Any = pretrained.tokenizer
    reads_padding = bool(getattr(pretrained.model.encoders["text"], "reads_padding", False))
    if isinstance(tokenizer, ClipTokenizer) and (tokenizer.pad_id == 0 or not reads_padding):
        return
    clean = tokenizer.clean if isinstance(tokenizer, HuggingFaceTokenizer) else "none"
    write_tokenizer(tokenizer, out, reads_padding, cleans=clean not in CLEANED)
    text["hf_tokenizer_name"] = "tokenizer.json"  # any name: of a local folder its own files are read
    text["tokenizer_kwargs"] = {"clean": clean if clean in CLEANED else "whitespace"}


def _write_weights(pretrained: Pretrained, path: Path, config: Config) -> None:
    from safetensors.torch import save_file

    eos_id = pretrained.tokenizer.eos_id if "hf_tokenizer_name" in config["text_cfg"] else None
    described = open_clip_config.describe(config, eos_id=eos_id)
    weights = {name: tensor.detach().float() for name, tensor in pretrained.model.state_dict().items()}
    if "patch_size" in config["vision_cfg"]:
        _fold_patch_bias(weights, keep=bool(config["vision_cfg"].get("no_ln_pre")))
    elif isinstance(
        config["vision_cfg"].get("layers"), list
    ):  # a ResNet's projection has a bias there, perhaps of zeros
        weights.setdefault("projections.image.bias", torch.zeros(config["embed_dim"]))
    theirs = to_theirs(weights, described.table, "open_clip")
    save_file({name: tensor.clone().contiguous() for name, tensor in theirs.items()}, path, metadata={"format": "pt"})


def _fold_patch_bias(weights: dict[str, Tensor], keep: bool) -> None:
    """Add the bias of the patch embedding, which open_clip's ViT lacks, to the positions of the patches: the same sum.

    `keep`: leave a bias of zeros there, as the table of names for a ViT without a norm before its blocks has one.
    """
    bias = weights.pop(f"{BACKBONE}.patch_embed.proj.bias", None)
    if bias is None:
        return
    positions = weights[f"{BACKBONE}.pos_embed"].clone()
    positions[:, 1:] += bias
    weights[f"{BACKBONE}.pos_embed"] = positions
    if keep:
        weights[f"{BACKBONE}.patch_embed.proj.bias"] = torch.zeros_like(bias)


def _compare(
    open_clip: Any, out: Path, pretrained: Pretrained, given: Samples, pictures: list[Tensor]
) -> tuple[dict[str, tuple[Tensor, Tensor]], Any]:
    """Run open_clip on the written folder, and ours: name of the output -> (theirs, ours); and its transform."""
    try:
        theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    except (RuntimeError, ValueError, TypeError) as error:  # names or shapes that differ; a config it refuses
        raise InputError(
            f"open_clip {open_clip.__version__} cannot load the model: {' '.join(str(error).split())[:400]}"
        ) from error
    theirs.eval()
    model, preprocess, tokenizer = pretrained
    ids = open_clip.get_tokenizer(f"local-dir:{out}")(given.texts)
    texts = tokenizer(given.texts)
    images = torch.stack([transform(image) for image in given.images])
    with torch.no_grad():
        found = {
            "pixels": (images, torch.stack(pictures)),
            "token ids": (ids, _padded(tokenizer, texts, ids)),
            "image embedding": (
                theirs.encode_image(images, normalize=True),
                model.embed("image", batched(preprocess, given.pictures)),
            ),
            "text embedding": (theirs.encode_text(ids, normalize=True), model.embed("text", texts)),
            "logit scale": (theirs.logit_scale.reshape(1), model.logit_scale),
        }
        if model.fusion is not None:
            found["captions"] = _captions(theirs, model, batched(preprocess, given.pictures), images, texts, ids)
    return found, transform


def _padded(tokenizer: Any, texts: Padded, ids: Tensor) -> Tensor:
    """Our ids, padded as far as theirs; with their padding where ours is never read."""
    room = ids.shape[1] - texts.values.shape[1]
    values, mask = F.pad(texts.values, (0, room), value=tokenizer.pad_id), texts.mask
    if mask is None or isinstance(tokenizer, HuggingFaceTokenizer) or tokenizer.pad == "context_length":
        return values
    return torch.where(F.pad(mask, (0, room)), values, ids)


def _captions(
    theirs: Any, model: Any, pixels: Padded, images: Tensor, texts: Padded, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities (P,V) of the next ids, at the real positions of each text."""
    rows = slice(0, min(len(ids), len(images)))
    logits = theirs(images[rows], ids[rows])["logits"]
    values, mask = texts.values[rows], texts.mask
    prediction = model({"image": pixels.rows(rows), "text": Padded(values)}).predictions["caption"]
    ours = prediction.hidden @ prediction.weight.T
    real = torch.ones_like(values[:, 1:], dtype=torch.bool) if mask is None else mask[rows, 1:]
    return logits[:, : ours.shape[1]].softmax(-1)[real], ours.softmax(-1)[real]
