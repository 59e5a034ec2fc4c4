"""Out: a folder that transformers loads as CLIPModel, SiglipModel or Siglip2Model, checked with transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.interop.huggingface_config import Config
from mmpretrain.interop.huggingface_describe import ARCHITECTURES, Described, describe
from mmpretrain.interop.huggingface_names import TABLES
from mmpretrain.interop.huggingface_preprocess import FILE, their_preprocess
from mmpretrain.interop.huggingface_tokenizer_out import write_tokenizer
from mmpretrain.interop.names import to_theirs
from mmpretrain.interop.out_folder import needed, new_folder
from mmpretrain.interop.parity import Parity, check
from mmpretrain.interop.samples import Reading, Samples, batched, normalized, read_files, real_ids, samples
from mmpretrain.interop.towers import normalization, stated_image
from mmpretrain.pretrained import Pretrained, load


def export(folder: str | Path, out: str | Path, tolerance: float = 1e-5, allow: Sequence[str] = ()) -> Parity:
    """Write a model folder as one of transformers: config, weights, image processor and tokenizer, and `parity.json`.

    transformers loads the result and is compared with the model: embeddings of pictures and texts, pixels, token ids.
    Raises `InputError` without the extra `huggingface`, for a part that transformers' classes lack, and beyond
    `tolerance`.
    """
    transformers = needed("huggingface", "transformers")
    pretrained = load(folder, allow=allow)
    described = describe(pretrained.model, getattr(pretrained.tokenizer, "start_id", None), pretrained.tokenizer.pad_id)
    stated = stated_image(folder)
    settings = their_preprocess(pretrained.preprocess, *normalization(pretrained.model.encoders["image"], stated))
    with new_folder(out, "huggingface") as temporary:
        _write(temporary, pretrained, described, settings)
        given = samples(pretrained.preprocess)
        outputs = _compare(transformers, temporary, pretrained, described, settings, given)
        files = _files(transformers, temporary, pretrained.preprocess, described, settings, given)
        packages = ["transformers"]
        found = check(outputs | files.outputs, tolerance, given.described(), "huggingface", packages, files.notes)
        found.write(temporary)
    return found


def _write(out: Path, pretrained: Pretrained, described: Described, settings: Config) -> None:
    from safetensors.torch import save_file

    reads_padding = bool(getattr(pretrained.model.encoders["text"], "reads_padding", False))
    write_tokenizer(pretrained.tokenizer, out, reads_padding)
    weights = to_theirs(pretrained.model.state_dict(), TABLES[described.model_type], "huggingface")
    # Copies, as parts of one tensor share memory, which safetensors does not write.
    copies = {name: tensor.detach().to(torch.float32).clone().contiguous() for name, tensor in weights.items()}
    save_file(copies, out / "model.safetensors", metadata={"format": "pt"})
    for name, content in (("config.json", described.config), (FILE, settings)):
        (out / name).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _compare(
    transformers: Any, out: Path, pretrained: Pretrained, described: Described, settings: Config, given: Samples
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run transformers on the written folder, and ours: name of the output -> (theirs, ours)."""
    kind = getattr(transformers, ARCHITECTURES[described.model_type], None)
    if kind is None:
        raise InputError(f"transformers {transformers.__version__} has no {ARCHITECTURES[described.model_type]}")
    theirs = _loaded(transformers, kind, out)
    model, preprocess, tokenizer = pretrained
    texts = tokenizer(given.texts)
    inputs = _images(normalized(given.pictures, settings["image_mean"], settings["image_std"]), described, settings)
    with torch.no_grad():
        found = theirs.eval()(input_ids=texts.values, **inputs)
        ours = {
            "image": model.embed("image", batched(preprocess, given.pictures)),
            "text": model.embed("text", texts),
        }
    reads_padding = bool(getattr(model.encoders["text"], "reads_padding", False))
    return {
        "image embedding": (found.image_embeds, ours["image"]),
        "text embedding": (found.text_embeds, ours["text"]),
        "logit scale": (theirs.logit_scale.reshape(1), model.logit_scale),
        "token ids": _ids(transformers, out, tokenizer, given.texts, reads_padding),
        "pixels": _pixels(transformers, out, preprocess, described, settings, given),
    }


def _loaded(transformers: Any, kind: Any, out: Path) -> Any:
    """Load the folder with transformers, which must find a place for every weight."""
    try:
        model, info = kind.from_pretrained(out, local_files_only=True, output_loading_info=True)
    except (RuntimeError, ValueError) as error:  # weights of other shapes; a config it refuses
        raise InputError(
            f"transformers {transformers.__version__} cannot load the model: {' '.join(str(error).split())[:400]}"
        ) from error
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise InputError(f"transformers {transformers.__version__} does not agree on {', '.join(sorted(wrong)[:12])}")
    return model


def _ids(transformers: Any, out: Path, tokenizer: Any, texts: list[str], reads_padding: bool) -> tuple[Tensor, Tensor]:
    """Token ids of their tokenizer and ours, with padding where it is read."""
    length = tokenizer.context_length
    loaded = transformers.AutoTokenizer.from_pretrained(out, local_files_only=True)
    found = loaded(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    ours = tokenizer(texts)
    if reads_padding:
        return found["input_ids"], ours.values
    return real_ids(found["input_ids"], found["attention_mask"], length), real_ids(ours.values, ours.mask, length)


def _pixels(
    transformers: Any, out: Path, preprocess: Any, described: Described, settings: Config, given: Samples
) -> tuple[Tensor, Tensor]:
    """Pixels of their image processor, the one that resizes with PIL, and of ours, files read as theirs does."""
    found = _processor(transformers, out, settings)(images=given.images, return_tensors="pt")
    ours = copy.copy(preprocess)
    ours.read = "rgb"  # a centre at half a pixel is rounded otherwise
    pictures = normalized([ours(image) for image in given.images], settings["image_mean"], settings["image_std"])
    return found["pixel_values"], _images(pictures, described, settings)["pixel_values"]


def _files(
    transformers: Any, out: Path, preprocess: Any, described: Described, settings: Config, given: Samples
) -> Reading:
    """Pixels of odd files by their image processor, and by our preprocessing as it is."""
    processor = _processor(transformers, out, settings)

    def theirs(image: Image.Image) -> Tensor:
        pixels: Tensor = processor(images=[image], return_tensors="pt")["pixel_values"]
        return pixels

    def ours(image: Image.Image) -> Tensor:
        pictures = normalized([preprocess(image)], settings["image_mean"], settings["image_std"])
        return _images(pictures, described, settings)["pixel_values"]

    return read_files(given, theirs, ours, same=preprocess.read == "rgb")


def _processor(transformers: Any, out: Path, settings: Config) -> Any:
    kind = settings["image_processor_type"]
    processor = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    return processor.from_pretrained(out, local_files_only=True)


def _images(pictures: list[Tensor], described: Described, settings: Config) -> dict[str, Tensor]:
    """What their model takes: pictures of one size, or patches row by row with their validity and the grid's sides."""
    if described.model_type != "siglip2":
        return {"pixel_values": torch.stack(pictures)}
    size, room = settings["patch_size"], settings["max_num_patches"]
    values = torch.zeros(len(pictures), room, size * size * 3)
    mask = torch.zeros(len(pictures), room, dtype=torch.int64)
    sides = []
    for row, picture in enumerate(pictures):
        rows, columns = (side // size for side in picture.shape[1:])
        patches = picture.view(3, rows, size, columns, size).permute(1, 3, 2, 4, 0).reshape(rows * columns, -1)
        values[row, : len(patches)], mask[row, : len(patches)] = patches, 1
        sides.append((rows, columns))
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(sides)}
