"""Which of open_clip's packaged configs convert: every name and shape, checked without making a weight.

python -m mmpretrain.interop.open_clip_coverage docs/open_clip-models.md      # writes the table
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mmpretrain.errors import InputError
from mmpretrain.interop.converted import expected
from mmpretrain.interop.names import check_keys, to_ours, to_theirs
from mmpretrain.interop.open_clip_config import describe
from mmpretrain.interop.open_clip_in import config_files
from mmpretrain.whole_file import write_whole

_ROBERTA = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_MT5 = {
    "model_type": "mt5",
    "is_encoder_decoder": True,
    "vocab_size": 250112,
    "d_kv": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_NLLB = {
    "model_type": "m2m_100",
    "is_encoder_decoder": True,
    "vocab_size": 256206,
    "d_model": 1024,
    "encoder_attention_heads": 16,
    "decoder_attention_heads": 16,
    "max_position_embeddings": 1024,
    "activation_function": "relu",
    "scale_embedding": True,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}


def _nllb(layers: int, hidden: int) -> dict[str, Any]:
    sizes = {
        f"{side}_{key}": x for side in ("encoder", "decoder") for key, x in (("layers", layers), ("ffn_dim", hidden))
    }
    return _NLLB | sizes


HUB: dict[str, dict[str, Any]] = {
    "roberta-base": {"model_type": "roberta", "vocab_size": 50265, **_ROBERTA},
    "xlm-roberta-base": {"model_type": "xlm-roberta", "vocab_size": 250002, **_ROBERTA},
    "xlm-roberta-large": {"model_type": "xlm-roberta", "vocab_size": 250002, **_ROBERTA, **_LARGE},
    "google/mt5-base": {**_MT5, "d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "google/mt5-xl": {**_MT5, "d_model": 2048, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "facebook/nllb-200-distilled-600M": _nllb(12, 4096),
    "facebook/nllb-200-distilled-1.3B": _nllb(24, 8192),
}
"""Published sizes of the text models that configs name, for this check only; `convert` reads their own files."""

COMPARED = (
    "ViT-B-32",
    "ViT-B-32-quickgelu",
    "ViT-L-14-336",
    "RN50",
    "RN50x4",
    "convnext_base_w",
    "EVA02-B-16",
    "roberta-ViT-B-32",
    "xlm-roberta-base-ViT-B-32",
    "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2",
    "ViT-SO400M-14-SigLIP",
    "coca_ViT-B-32",
    "coca_ViT-L-14",
    "ViTamin-S",
    "MobileCLIP-S1",
    "PE-Core-B-16",
)
"""Configs whose embeddings are compared at full size, with random weights, in tests/interop/test_open_clip_full.py."""

TITLE = """# open_clip's models

Every config that open_clip {version} packages, and whether `mmpretrain convert` takes its weights (timm {timm},
transformers {transformers}). This page is generated:
`python -m mmpretrain.interop.open_clip_coverage docs/open_clip-models.md`.

"Names" means that each tensor open_clip's model has was matched with one of ours of the same shape, none left over on
either side, and back. "Embeddings" means that besides, a model of that size with random weights gave equal embeddings
of pictures and texts (1e-5, float32) in both libraries; small models of every kind are compared the same way.

{count} configs: {converts} convert, {refused} refused.

| config | converts | image encoder | text encoder | checked by |
| --- | --- | --- | --- | --- |
"""


class Row(NamedTuple):
    """One config in the table; `refusal` is empty where it converts."""

    name: str
    image: str
    text: str
    refusal: str

    def line(self) -> str:
        """Write the row as Markdown."""
        checked = "names, embeddings" if self.name in COMPARED else "names"
        answer, how = ("yes", checked) if not self.refusal else (f"no: {self.refusal}", "")
        return f"| {self.name} | {answer} | {self.image} | {self.text} | {how} |\n"


def check(name: str, config: Mapping[str, Any]) -> Row:
    """Match one config's names and shapes both ways; raises `InputError` where they differ but no field is refused."""
    text = config["text_cfg"]
    encoder = text.get("hf_model_name")
    eos_id = int(text.get("eos_id", 1)) if text.get("hf_tokenizer_name") else None  # the file of a tokenizer says it
    image = str(config["vision_cfg"].get("timm_model_name") or "native")
    row = Row(name, image if image == "native" else f"timm `{image}`", f"`{encoder}`" if encoder else "native", "")
    try:
        described = describe(config, HUB.get(encoder), eos_id)
    except InputError as error:
        return row._replace(refusal=" ".join(str(error).split()).replace("|", "/"))
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        theirs = build(config, Path(folder)).state_dict()
    ours = to_ours(theirs, described.table, name)
    check_keys(ours, expected(described.model), name)
    check_keys(to_theirs(_numbers(ours), described.table, name), theirs, name)
    return row


def _numbers(ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give those that are looked at on the way back (a bias that must be zero) a value."""
    return {k: torch.zeros(x.shape) if k.endswith("patch_embed.proj.bias") else x for k, x in ours.items()}


def build(config: Mapping[str, Any], folder: Path, hub: Mapping[str, Mapping[str, Any]] = HUB) -> nn.Module:
    """Build open_clip's own model of a config; that of a Hugging Face text model is written to `folder`."""
    import open_clip

    given = copy.deepcopy(dict(config))
    text = given["text_cfg"]
    custom = given.pop("custom_text", False) or bool(text.get("hf_model_name"))
    if text.get("hf_model_name"):
        (folder / "config.json").write_text(json.dumps(hub[text["hf_model_name"]]), encoding="utf-8")
        text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    if "multimodal_cfg" in given and custom:
        made: nn.Module = open_clip.CoCa(**given)
    else:
        made = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**given)
    return made


def page(rows: Sequence[Row]) -> str:
    """Write the whole page."""
    from importlib.metadata import version

    refused = sum(bool(row.refusal) for row in rows)
    title = TITLE.format(
        version=version("open_clip_torch"),
        timm=version("timm"),
        transformers=version("transformers"),
        count=len(rows),
        converts=len(rows) - refused,
        refused=refused,
    )
    return title + "".join(row.line() for row in rows)


def main() -> None:
    """Check every config, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m mmpretrain.interop.open_clip_coverage", description=__doc__)
    parser.add_argument("out", type=Path, help="the Markdown file to write")
    out: Path = parser.parse_args().out
    rows = []
    for name, file in config_files().items():
        rows.append(check(name, json.loads(file.read_text(encoding="utf-8"))))
        print(rows[-1].line(), end="", flush=True)
    write_whole(out, page(rows))


if __name__ == "__main__":
    main()
