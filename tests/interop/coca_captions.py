"""Write coca_captions.json: what open_clip's own `generate` says for a small CoCa (it needs transformers below 5).

python -m tests.interop.coca_captions
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import torch

from mmpretrain.interop.open_clip_coverage import build
from tests.interop.open_clip_models import randomised

FILE = Path(__file__).with_suffix(".json")
VOCAB, START, END, LENGTH = 40, 38, 39, 16
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32,
        "patch_size": 8,
        "layers": 1,
        "width": 48,
        "head_width": 24,
        "attentional_pool": True,
        "attn_pooler_queries": 5,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": LENGTH,
        "vocab_size": VOCAB,
        "width": 32,
        "heads": 2,
        "layers": 1,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {"context_length": LENGTH, "vocab_size": VOCAB, "width": 32, "heads": 2, "layers": 1},
    "custom_text": True,
}
OPTIONS = [
    {"seq_len": 12},
    {"seq_len": 12, "num_beams": 4, "num_beam_groups": 1, "min_seq_len": 2},
    {"seq_len": 8, "num_beams": 6, "num_beam_groups": 2, "min_seq_len": 3},
]


def model() -> torch.nn.Module:
    """Build open_clip's model, with weights large enough that pictures get captions of different lengths."""
    torch.manual_seed(0)
    made = randomised(build(CONFIG, Path()))
    with torch.no_grad():
        made.text_decoder.text_projection.normal_(0, 0.2, generator=torch.Generator().manual_seed(5))
        made.text_decoder.text_projection[:, END] = 1.1 * made.text_decoder.text_projection[:, 6]
        made.visual.conv1.weight.mul_(20)
    return made


def images() -> torch.Tensor:
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(7))


def main() -> None:
    written = []
    for options in OPTIONS:
        ids = model().generate(images(), sot_token_id=START, eos_token_id=END, pad_token_id=0, **options)
        written.append({"options": options, "ids": ids.tolist()})
    versions = {name: version(name) for name in ("open_clip_torch", "transformers", "torch")}
    FILE.write_text(json.dumps({"versions": versions, "captions": written}, indent=1) + "\n")


if __name__ == "__main__":
    main()
