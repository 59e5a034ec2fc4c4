from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from mmpretrain import HuggingFaceTextEncoder, InputError, MultimodalModel
from mmpretrain.config import build_saved

transformers = pytest.importorskip("transformers")

BERT = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}
IDS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
MASK = IDS != 0


def encoder(config=BERT, **options):
    torch.manual_seed(0)
    return HuggingFaceTextEncoder(config, 12, **options).eval()


def test_tokens_are_those_of_the_library_and_pooling_is_over_real_ones():
    ours = encoder()
    with torch.no_grad():
        expected = ours.transformer(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state
        found = ours(IDS, MASK)
    assert torch.equal(found.tokens, expected)
    mean = torch.stack([expected[0].mean(0), expected[1, :3].mean(0)])
    assert torch.allclose(found.pooled, mean, atol=1e-6)
    first = HuggingFaceTextEncoder(BERT, 12, "first").eval()
    first.load_state_dict(ours.state_dict())
    assert torch.equal(first(IDS, MASK).pooled, expected[:, 0])


def test_the_models_own_pooling_layer_is_there_only_where_it_is_used():
    assert not any("pooler" in name for name in encoder().state_dict())
    pooled = encoder(pooling="pooler")
    with torch.no_grad():
        expected = pooled.transformer(input_ids=IDS, attention_mask=MASK.long()).pooler_output
        assert torch.equal(pooled(IDS, MASK).pooled, expected)


T5 = {"model_type": "t5", "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 8, "vocab_size": 40}


@pytest.mark.parametrize("config", [BERT, T5])
def test_inner_layers_are_given_by_number(config):
    ours = encoder(config)
    with torch.no_grad():
        first, last = ours.encode_layers(IDS, MASK, (0, -1))
        found = ours(IDS, MASK)
    assert torch.equal(last.tokens, found.tokens)
    assert torch.equal(last.pooled, found.pooled)
    assert not torch.allclose(first.tokens, last.tokens)
    assert len(ours.layer_info()) == 2
    with pytest.raises(InputError, match="norms inside"):
        ours.encode_layers(IDS, MASK, norm=True)
    with pytest.raises(InputError, match="no layer 2"):
        ours.encode_layers(IDS, MASK, (2,))


def test_padding_changes_nothing():
    ours = encoder()
    with torch.no_grad():
        alone = ours(IDS[1:, :3])
        padded = ours(IDS, MASK)
    assert torch.allclose(alone.pooled[0], padded.pooled[1], atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_weights_of_a_folder_are_loaded_with_or_without_a_prefix(prefix, tmp_path):
    given = encoder()
    weights = {prefix + name: x for name, x in given.transformer.state_dict().items()}
    save_file(weights | {"cls.predictions.bias": torch.zeros(40)}, tmp_path / "model.safetensors")
    loaded = HuggingFaceTextEncoder(BERT, 12, pretrained=tmp_path)
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in given.state_dict().items())
    weights.pop(f"{prefix}embeddings.LayerNorm.bias")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"missing embeddings\.LayerNorm\.bias"):
        HuggingFaceTextEncoder(BERT, 12, pretrained=tmp_path)


def test_it_is_built_from_a_saved_config_and_never_writes_captions():
    config = {"_target_": "mmpretrain.HuggingFaceTextEncoder", "config": BERT, "context_length": 12}
    model = {"_target_": "mmpretrain.MultimodalModel", "embed_dim": 8, "encoders": {"text": config}}
    built = build_saved(model)
    assert isinstance(built, MultimodalModel)
    assert built.embed("text", IDS).shape == (2, 8)
    assert built.encoders["text"].causal is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation"),
        ({"_attn_implementation": "someone/kernel"}, "_attn_implementation"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"model_type": "unheard-of"}, "unheard-of"),
        ({"hidden_size": 15}, "15"),
        ({"model_type": "clip"}, "no text model"),
        ({"model_type": "timm_wrapper", "architecture": "hf-hub:some/where"}, "no text model"),
    ],
)
def test_configs_that_bring_code_or_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        HuggingFaceTextEncoder(BERT | change, 12)


@pytest.mark.parametrize(("model_type", "most"), [("bert", 20), ("roberta", 18)])  # whose first positions are unused
def test_texts_longer_than_the_learned_positions_are_refused(model_type, most):
    config = {**BERT, "model_type": model_type, "max_position_embeddings": 20, "pad_token_id": 1}
    encoder = HuggingFaceTextEncoder(config, most).eval()
    with torch.no_grad():
        assert encoder(torch.full((1, most), 5)).tokens.shape[1] == most
    with pytest.raises(InputError, match=rf"context_length={most + 1} but .* positions for {most} ids"):
        HuggingFaceTextEncoder(config, most + 1)


def test_other_mistakes_are_named():
    with pytest.raises(InputError, match="pooling is 'max'"):
        encoder(pooling="max")
    with pytest.raises(InputError, match=r"shape \(1, 13\).*up to 12"):
        encoder()(torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(InputError, match="no pooling layer of its own"):
        encoder(T5, pooling="pooler")


def test_pretrained_weights_that_are_no_floats_are_refused(tmp_path):
    encoder = HuggingFaceTextEncoder(BERT, 12)
    weights = encoder.transformer.state_dict()
    name = next(iter(weights))
    save_file({**weights, name: (weights[name] * 100).to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=rf"no floats: {re.escape(name)} \(int8\)"):
        HuggingFaceTextEncoder(BERT, 12, pretrained=tmp_path)
