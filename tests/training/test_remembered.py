"""What frozen encoders give is kept: the same numbers, each text computed once, whatever batch it comes in."""

from __future__ import annotations

import pytest
import torch

from mmpretrain import ContrastiveLoss, HuggingFaceTextEncoder, InputError, MultimodalModel, Padded
from mmpretrain.training.remembered import remember_frozen, remembers
from tests import models
from tests.training.test_lora import BERT


def locked() -> MultimodalModel:
    plain = models.clip()
    return MultimodalModel(16, dict(plain.encoders), freeze=["text"])


def test_embeddings_and_gradients_are_those_without():
    torch.manual_seed(0)
    model = locked()
    batch = models.batch(6)
    want = model(batch).embeddings["text"].detach()
    ContrastiveLoss()(model(batch)).backward()
    gradient = model.projections["text"].weight.grad.clone()
    model.zero_grad()
    remember_frozen(model)
    assert remembers(model) and not remembers(locked())
    outputs = model(batch)
    torch.testing.assert_close(outputs.embeddings["text"].detach(), want, rtol=0, atol=1e-6)
    ContrastiveLoss()(outputs).backward()
    torch.testing.assert_close(model.projections["text"].weight.grad, gradient, rtol=1e-4, atol=1e-6)


def test_each_text_is_computed_once_and_the_same_in_any_batch():
    model = locked()
    remember_frozen(model, rows=5)
    keeping = model.encoders["text"].forward
    calls = []
    plain = keeping.plain
    keeping.plain = lambda *given: calls.append(given[1].shape) or plain(*given)
    batch = models.batch(4)
    first = model(batch).embeddings["text"]
    computed = len(calls)
    assert torch.equal(first, model(batch).embeddings["text"])
    text = batch["text"].rows(slice(2))
    wider = Padded(*(torch.nn.functional.pad(t, (0, 3)) for t in (text.values, text.mask)))  # the same, padded further
    pixels = Padded(batch["image"].values[:2])
    narrow = model({"image": pixels, "text": wider}).embeddings["text"]
    torch.testing.assert_close(narrow, first[:2], rtol=0, atol=1e-6)
    assert len(calls) == computed and {shape[0] for shape in calls} == {1}
    model(models.batch(4, seed=9))
    assert len(keeping.known) == 5  # the oldest are forgotten
    computed = len(calls)
    with torch.no_grad():
        model.embed("text", models.batch(4, seed=10)["text"])
    assert calls[computed:] == [(4, models.batch(4, seed=10)["text"].values.shape[1])]  # evaluation keeps nothing
    assert len(keeping.known) == 5


@pytest.mark.parametrize("text", ["ours", "bert"])
def test_a_text_is_the_same_to_the_bit_whatever_came_with_it(text):
    encoder = models.clip().encoders["text"] if text == "ours" else HuggingFaceTextEncoder(BERT, context_length=12)
    found = []
    for order in (slice(None), slice(40, None, -1), slice(3)):
        model = MultimodalModel(16, {"text": encoder}, freeze=["text"])
        remember_frozen(model)
        rows = models.batch(41, seed=1)["text"]
        values, mask = (t.flip(0) if order.step else t[order] for t in (rows.values, rows.mask))
        model({"text": Padded(values, mask)})
        found.append(dict(model.encoders["text"].forward.known))
        del model.encoders["text"].forward
    for other in found[1:]:
        assert other and all(torch.equal(found[0][key], value) for key, value in other.items())


def test_what_is_kept_is_exact_under_autocast_too():
    model, other = locked(), locked()
    remember_frozen(model)
    remember_frozen(other)
    batch = models.batch(3)
    model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        other(batch)
    kept, also = (m.encoders["text"].forward.known for m in (model, other))
    assert len(kept) == 3 and all(torch.equal(also[key], value) for key, value in kept.items())


def test_models_that_have_nothing_to_keep_are_refused():
    with pytest.raises(InputError, match=r"finetune\.freeze"):
        remember_frozen(models.clip())
    coca = models.coca()
    frozen = MultimodalModel(16, dict(coca.encoders), coca.fusion, dict(coca.heads), freeze=["text"])
    with pytest.raises(InputError, match="fusion"):
        remember_frozen(frozen)
