"""Full-size models with random weights, one at a time: what is compared at full size in docs/open_clip-models.md."""

from __future__ import annotations

import gc
import json
import time

import pytest
import torch

from mmpretrain import Padded
from mmpretrain.interop import converted
from mmpretrain.interop.open_clip_coverage import COMPARED, HUB, build
from mmpretrain.interop.open_clip_in import config_files, from_config
from tests.interop.open_clip_models import Both, errors, filled, word_tokenizer

SPECIALS = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>"}


@pytest.mark.full_size
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", COMPARED)
def test_embeddings_of_a_full_size_model_are_open_clips(name, tmp_path, record_property):
    config = json.loads(config_files()[name].read_text(encoding="utf-8"))
    text = config["text_cfg"]
    other = text.get("hf_tokenizer_name") is not None
    tokenizer = word_tokenizer(tmp_path, "<s> $A </s>", SPECIALS) if other else None
    torch.manual_seed(0)
    start = time.perf_counter()
    theirs = filled(build(config, tmp_path, HUB))
    made = from_config(config, theirs.state_dict(), None, tokenizer, name)
    pair = Both(theirs, converted.build(made), made)
    del made
    texts = _texts(text.get("context_length", 77), text.get("vocab_size", 40000), other)
    found = errors(pair, config["vision_cfg"]["image_size"], texts.values, texts)
    if "multimodal_cfg" in config:
        found = (*found, _caption_error(pair, texts) / 10)
    print(f"{name}: image {found[0]:.1e} text {found[1]:.1e} {found[2:]} in {time.perf_counter() - start:.0f} s")
    del pair, theirs
    gc.collect()
    assert max(found) < 1e-5


def _texts(length, vocab_size, other):
    counts = torch.tensor([3, 8, length])
    ids = torch.randint(4, min(vocab_size, 40000) - 2, (3, length), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(length) < counts[:, None]
    ids = ids.masked_fill(~mask, 1 if other else 0)
    ids[torch.arange(3), counts - 1] = 2 if other else vocab_size - 1
    return Padded(ids, mask)


def _caption_error(pair, texts):
    side = pair.theirs.visual.image_size[0]
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = pair.theirs(images, texts.values)["logits"]
        encoded = {"image": pair.ours.encode("image", images), "text": pair.ours.encode("text", texts)}
        ours = pair.ours.fusion(encoded)["text"] @ pair.ours.heads["caption"].weight.T
    return float((ours[:, :-1] - theirs)[texts.mask[:, 1:]].abs().max())
