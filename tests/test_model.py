"""The model: shapes, contracts, refusals, parameter counts of the published sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mmpretrain import (
    IGNORE_INDEX,
    CaptionHead,
    CrossAttentionFusion,
    InputError,
    MultimodalModel,
    Padded,
    TextEncoder,
)
from mmpretrain.model import identity
from tests import models


@pytest.mark.parametrize("family", [models.clip, models.siglip, models.coca])
def test_outputs(family):
    model, batch = family(), models.batch(5, pad_to=12)
    outputs = model(batch)
    for modality in ("image", "text"):
        embedding = outputs.embeddings[modality]
        assert embedding.shape == (5, 16) and embedding.dtype == torch.float32
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones(5))
        torch.testing.assert_close(model.embed(modality, batch[modality]), embedding)
    assert outputs.logit_scale.shape == (1,)
    assert (outputs.logit_bias is not None) == (family is models.siglip)
    assert set(outputs.predictions) == ({"caption"} if family is models.coca else set())


def test_start_of_scale_and_bias():
    assert models.clip().logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    siglip = models.siglip()
    assert siglip.logit_scale.item() == pytest.approx(math.log(10)) and siglip.logit_bias.item() == -10
    assert siglip.logit_scale.shape == siglip.logit_bias.shape == (1,)


def test_embeddings_stay_float32_under_autocast():
    model, batch = models.coca().eval(), models.batch(3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
    assert all(e.dtype == torch.float32 for e in outputs.embeddings.values())
    torch.testing.assert_close(outputs.embeddings["image"].norm(dim=-1), torch.ones(3))


def test_ecosystem_names_take_plain_tensors():
    model, batch = models.clip().eval(), models.batch(3)
    torch.testing.assert_close(model.encode_image(batch["image"].values), model.embed("image", batch["image"]))
    torch.testing.assert_close(model.encode_text(batch["text"].values), model.embed("text", batch["text"]))


def test_caption_labels_are_the_next_tokens_and_skip_padding():
    model, batch = models.coca(), models.batch(3, lengths=[4, 7, 12])
    prediction = model(batch).predictions["caption"]
    ids = batch["text"].values
    assert prediction.hidden.shape == (3, 11, 32) and prediction.weight.shape == (models.VOCAB, 32)
    for row, length in enumerate([4, 7, 12]):
        assert prediction.labels[row, : length - 1].tolist() == ids[row, 1:length].tolist()
        assert (prediction.labels[row, length - 1 :] == IGNORE_INDEX).all()


def test_a_later_caption_token_changes_no_earlier_logit():
    model, batch = models.coca().double().eval(), models.batch(2, lengths=[9, 9])
    pixels = Padded(batch["image"].values.double())
    other = batch["text"].values.clone()
    other[:, 6] = other[:, 6] % 40 + 1
    hidden = [
        model({"image": pixels, "text": Padded(ids, batch["text"].mask)}).predictions["caption"].hidden
        for ids in (batch["text"].values, other)
    ]
    torch.testing.assert_close(hidden[1][:, :6], hidden[0][:, :6], rtol=0, atol=0)
    assert (hidden[1][:, 6:] - hidden[0][:, 6:]).abs().max() > 1e-6


def test_captions_read_the_image():
    model, batch = models.coca().eval(), models.batch(2)
    hidden = [
        model({"image": Padded(values), "text": batch["text"]}).predictions["caption"].hidden
        for values in (batch["image"].values, 255 - batch["image"].values)
    ]
    assert (hidden[0] - hidden[1]).abs().max() > 1e-4


def test_contrast_weight_zero_leaves_the_text_projection_without_gradient():
    from mmpretrain import PredictionLoss

    model = models.coca()
    PredictionLoss()(model(models.batch(4))).backward()
    assert model.projections["text"].weight.grad is None
    assert model.encoders["text"].class_token.grad is None or not model.encoders["text"].class_token.grad.any()
    assert model.heads["caption"].weight.grad.abs().sum() > 0


def test_frozen_encoders_get_no_gradient_and_stay_in_evaluation_mode():
    parts = {"image": models.clip().encoders["image"], "text": models.clip().encoders["text"]}
    model = MultimodalModel(16, parts, freeze=["image"]).train()
    assert not model.encoders["image"].training and model.encoders["text"].training
    sum(e.sum() for e in model(models.batch(2)).embeddings.values()).backward()
    assert all(p.grad is None for p in model.encoders["image"].parameters())
    assert model.projections["image"].weight.grad is not None


def test_missing_modalities_give_what_is_there():
    outputs = models.coca()({"text": models.batch(2)["text"]})
    assert set(outputs.embeddings) == {"text"} and outputs.predictions == {}


def test_projections_can_be_given():
    parts = {"text": models.clip().encoders["text"]}
    assert isinstance(MultimodalModel(32, parts, projections={"text": nn.Identity()}).projections["text"], nn.Identity)


def test_parts_that_do_not_fit_are_refused():
    encoders = dict(models.siglip().encoders)
    with pytest.raises(InputError, match=r"bidirectional.*causal=true"):
        MultimodalModel(16, encoders, CrossAttentionFusion(32, 1, 2), {"caption": CaptionHead(models.VOCAB, 32)})
    with pytest.raises(InputError, match=r"model\.fusion"):
        MultimodalModel(16, dict(models.clip().encoders), heads={"caption": CaptionHead(models.VOCAB, 32)})
    with pytest.raises(InputError, match="audio"):
        MultimodalModel(16, encoders, freeze=["audio"])
    with pytest.raises(InputError, match="no encoder for 'audio'; this model has image, text"):
        models.clip().encode("audio", torch.zeros(1, 1, 2, 2))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 49407), min_size=1, max_size=6), min_size=2, max_size=6),
    st.integers(0, 4),
)
def test_identity_tells_rows_apart_whatever_their_padding(rows, extra):
    longest = max(map(len, rows)) + extra
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.arange(longest)[None] < torch.tensor([len(row) for row in rows])[:, None]
    hashes = identity(Padded(ids, mask)).tolist()
    for i, a in enumerate(rows):
        for j, b in enumerate(rows):
            assert (hashes[i] == hashes[j]) == (a == b)


def test_identity_tells_orders_apart():
    ids = torch.tensor([[1, 2, 3], [3, 2, 1], [1, 3, 2], [2, 2, 2]])
    assert len(set(identity(Padded(ids)).tolist())) == 4


def test_separate_projections_are_reachable_by_name():
    names = {name for name, module in models.coca().named_modules() if isinstance(module, nn.Linear)}
    for projection in "qkvo":
        assert f"encoders.text.blocks.0.attention.{projection}" in names
        assert f"fusion.cross_blocks.0.attention.{projection}" in names


def test_text_encoder_on_its_own_satisfies_the_protocol():
    from mmpretrain.types import Encoder

    assert isinstance(TextEncoder(10, 4, 8, 1, 1, 9), Encoder)
