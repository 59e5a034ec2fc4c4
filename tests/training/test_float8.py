"""8-bit training through torchao: which layers, that gradients flow, and that names and evaluation stay exact."""

from __future__ import annotations

import pytest
import torch

from mmpretrain import InputError, MultimodalModel, TextEncoder
from mmpretrain.training.float8 import check_float8, convert_to_float8
from tests import models

torchao = pytest.importorskip("torchao")


def large() -> MultimodalModel:
    torch.manual_seed(0)
    text = TextEncoder(models.VOCAB, 12, 1024, 1, 16, models.EOS)
    return MultimodalModel(16, {"image": models.clip().encoders["image"], "text": text})


def test_large_layers_are_rounded_in_training_alone():
    batch, model = models.batch(4), large()
    names = list(model.state_dict())

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        found = model(batch).embeddings["text"]
        (found @ torch.linspace(-1, 1, 16)).sum().backward()
        return found.detach(), model.encoders["text"].blocks[0].mlp.up.weight.grad.clone()

    (exact, want), evaluated = step(), model.eval().embed("text", batch["text"])
    model.train()
    converted = convert_to_float8(model, emulate=True)
    assert len(converted) == 6 and all(name.startswith("encoders.text.blocks.0.") for name in converted)
    assert list(model.state_dict()) == names
    got, gradient = step()
    assert not torch.equal(got, exact) and gradient.dtype == torch.float32
    torch.testing.assert_close(got, exact, rtol=0, atol=0.1)
    assert torch.cosine_similarity(gradient.flatten(), want.flatten(), 0) > 0.98
    assert torch.equal(model.eval().embed("text", batch["text"]), evaluated)


def test_a_model_of_small_layers_is_refused():
    with pytest.raises(InputError, match="pays from ViT-L on"):
        convert_to_float8(models.clip(), emulate=True)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(InputError, match=r"compute capability 8\.9"):
        check_float8(compiled=True)
    monkeypatch.setattr("mmpretrain.training.float8.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'mmpretrain-contrastive\[fp8\]'"):
        check_float8(compiled=True)
