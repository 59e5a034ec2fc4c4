"""The paired models of the benchmarks: ours and open_clip's compute one function, loss and every gradient."""

from __future__ import annotations

import pytest
import torch

from benchmarks import _models, _open_clip
from mmpretrain.errors import InputError
from mmpretrain.types import Padded


def inputs(pair: _models.Pair, size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(size, 3, pair.image_size, pair.image_size, generator=generator, dtype=dtype)
    lengths = torch.tensor([3, pair.context_length, 5, 4, pair.context_length - 1, 7])[:size]
    ids = torch.randint(1, pair.eos_id - 1, (size, pair.context_length), generator=generator)
    position = torch.arange(pair.context_length)[None]
    ids[:, 0] = pair.eos_id - 1
    ids[position == lengths[:, None] - 1] = pair.eos_id
    mask = position < lengths[:, None]
    return images, ids.masked_fill(~mask, pair.pad_id), mask


@pytest.mark.parametrize("name", ["tiny", "tiny_coca"])
def test_both_sides_have_the_same_loss_and_gradients(name):
    pair = _models.pair(name, dtype=torch.float64)
    images, ids, mask = inputs(pair)
    ours = _models.our_loss(pair.ours, {"image": Padded(images), "text": Padded(ids, mask)})
    peer = _models.peer_loss(pair.peer, images, ids)
    torch.testing.assert_close(ours, peer, rtol=0, atol=1e-10)
    ours.backward()
    peer.backward()
    theirs = {n: p.grad for n, p in pair.peer.named_parameters()}
    expected = _open_clip.converted(theirs, _models.rules(_models.configuration(name)))
    found = {n: p.grad for n, p in pair.ours.named_parameters()}
    assert found.keys() == expected.keys()
    for parameter, gradient in found.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=0, atol=1e-10, msg=lambda m, n=parameter: n + m)


@pytest.mark.parametrize("name", ["tiny", "tiny_coca"])
def test_trimmed_text_changes_nothing(name):
    pair = _models.pair(name, dtype=torch.float64)
    images, ids, mask = inputs(pair)
    ids, mask, images = ids[[0, 2, 3]], mask[[0, 2, 3]], images[:3]
    ours = _models.our_loss(pair.ours, {"image": Padded(images), "text": Padded(ids[:, :5], mask[:, :5])})
    torch.testing.assert_close(ours, _models.peer_loss(pair.peer, images, ids), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-B-32-quickgelu", "coca_ViT-B-32", "coca_ViT-L-14"]
)
def test_every_weight_of_the_real_sizes_has_its_place(name):
    config = _models.configuration(name)
    converted = _open_clip.converted(_models.build_peer(config, device="meta").state_dict(), _models.rules(config))
    ours = _models.build_ours(config, device="meta").state_dict()
    assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in ours.items()}


def test_a_weight_without_a_rule_is_refused():
    with pytest.raises(InputError, match=r"visual\.surprise"):
        _open_clip.converted({"visual.surprise": torch.zeros(1)}, _open_clip.CLIP)


def test_an_unknown_name_is_refused():
    with pytest.raises(SystemExit, match="no model"):
        _models.pair("ViT-Z-1")
