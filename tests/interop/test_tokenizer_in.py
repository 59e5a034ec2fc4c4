from __future__ import annotations

import json

import pytest

from mmpretrain import InputError
from mmpretrain.interop.tokenizer_in import huggingface_tokenizer, special_tokens
from tests.interop.open_clip_models import word_tokenizer


@pytest.mark.parametrize(
    ("around", "settings", "start", "end"),
    [
        ("<s> $A </s>", {"eos_token": "</s>"}, "<s>", "</s>"),
        ("<s> $A </s>", {"sep_token": "</s>"}, "<s>", "</s>"),
        ("<s> $A </s>", {}, "<s>", "</s>"),
        ("$A </s>", {"eos_token": {"content": "</s>"}}, None, "</s>"),
        ("$A </s>", {}, None, "</s>"),
        ("<s> $A", {"eos_token": "</s>"}, "<s>", "</s>"),
        (
            "<s> $A",
            {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": False, "add_eos_token": True},
            None,
            "</s>",
        ),
        ("$A", {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}, "<s>", "</s>"),
    ],
)
def test_what_stands_around_a_text_is_found_out(around, settings, start, end, tmp_path):
    found = special_tokens(word_tokenizer(tmp_path, around, {"pad_token": "<pad>", **settings}))
    assert (found.start, found.end, found.pad, found.end_id, found.pad_id) == (start, end, "<pad>", 2, 1)


def test_padding_may_be_said_in_the_file_itself(tmp_path):
    import tokenizers

    word_tokenizer(tmp_path, "$A </s>", {})
    with pytest.raises(InputError, match="does not say its padding"):
        special_tokens(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=0, pad_token="<s>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = huggingface_tokenizer(tmp_path / "tokenizer.json", 9, "lower", strip_sep_token=True)
    assert (config["pad_token"], config["path"], config["strip_sep_token"]) == ("<s>", str(tmp_path), True)


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer\.json"):
        special_tokens(tmp_path)
    word_tokenizer(tmp_path, "</s> $A <s>", {"eos_token": "</s>", "pad_token": "<pad>"})
    with pytest.raises(InputError, match="its settings say that '</s>' ends one"):
        special_tokens(tmp_path)
    word_tokenizer(tmp_path, "<s> $A </s> <unk>", {"pad_token": "<pad>"})
    with pytest.raises(InputError, match="one token before it and one behind"):
        special_tokens(tmp_path)
    word_tokenizer(tmp_path, "$A </s>", {"pad_token": "<gone>"})
    with pytest.raises(InputError, match="lacks '<gone>', which"):
        special_tokens(tmp_path)
    word_tokenizer(tmp_path, "$A </s>", {"pad_token": 1})
    with pytest.raises(InputError, match="pad_token is 1; expected a token as text"):
        special_tokens(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([]))
    with pytest.raises(InputError, match="holds list; expected a JSON object"):
        special_tokens(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        special_tokens(tmp_path)
