"""In: a folder of transformers' CLIPModel, SiglipModel or Siglip2Model, as it is published or saved."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.interop.converted import Converted, as_float32
from mmpretrain.interop.files import HUGGINGFACE, read_tensors
from mmpretrain.interop.huggingface_config import Towers, our_model, read_json
from mmpretrain.interop.huggingface_names import IMAGE, NOT_WEIGHTS, TABLES, TEXT
from mmpretrain.interop.huggingface_preprocess import read_preprocess
from mmpretrain.interop.huggingface_tokenizer import read_tokenizer
from mmpretrain.interop.names import to_ours


def from_folder(path: str | Path) -> Converted:
    """Read a model folder of transformers: config.json, weights, preprocessor_config.json and tokenizer.json.

    What it is, `model_type` in config.json says: clip, siglip (SigLIP, and SigLIP 2 of fixed size) or siglip2 (NaFlex).
    Raises `InputError` for another, for a part that our model does not have, and for missing or extra weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder; give one with config.json and the weights beside it, or hf-hub:org/name"
        )
    towers = Towers(read_json(folder / "config.json"), f"{folder / 'config.json'}")
    weights = from_weights(read_tensors(folder, HUGGINGFACE), towers.type, str(folder))
    _check_depths(weights, towers)
    pictures = read_preprocess(folder, towers.type, towers.vision.get("image_size"))
    texts = read_tokenizer(folder, towers.type, towers.text["max_position_embeddings"])
    config = {
        "model": our_model(towers, texts.eos_id, pictures.mean, pictures.std),
        "preprocess": pictures.preprocess,
        "tokenizer": texts.tokenizer,
    }
    return Converted(config, weights, f"huggingface:{folder.name}")


def _check_depths(weights: dict[str, Tensor], towers: Towers) -> None:
    """Raise `InputError` where the config claims more layers than there are, before anything is built of them."""
    for name, half, prefix in (("vision_config", towers.vision, IMAGE), ("text_config", towers.text, TEXT)):
        blocks = re.compile(rf"{re.escape(prefix)}blocks\.(\d+)\.")
        found = {match[1] for key in weights if (match := blocks.match(key))}
        if half["num_hidden_layers"] > len(found):
            raise InputError(
                f"{towers.source}: {name} has {half['num_hidden_layers']} layers (num_hidden_layers) and the weights "
                f"{len(found)}; they are of another model, or not complete"
            )


def from_weights(tensors: dict[str, Tensor], model_type: str, source: str) -> dict[str, Tensor]:
    """Return the tensors of a published or saved model under our names, in float32."""
    kept = {name: tensor for name, tensor in tensors.items() if name not in NOT_WEIGHTS}
    return as_float32(to_ours(kept, TABLES[model_type], source))
