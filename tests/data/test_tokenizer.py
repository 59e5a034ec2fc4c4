from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from mmpretrain.data.tokenizer import ByteTokenizer, ClipTokenizer, HuggingFaceTokenizer
from mmpretrain.errors import InputError
from mmpretrain.types import Tokenizer

PEER = SimpleTokenizer()

SCRIPTS = """a photo of a cat|A PHOTO OF A CAT|Ein schöner Käse|naïve café|Ærøskøbing|straße STRASSE ẞ|İstanbul ıi|ǅ ǆ
Привет, мир|Ελληνικά ΣΊΣΥΦΟΣ|שלום עולם|مرحبا بالعالم|السَّلامُ عَلَيْكُم|नमस्ते दुनिया|สวัสดีชาวโลก|你好，世界|こんにちは世界|カタカナ ﾊﾝｶｸ|안녕하세요
ქართული|Հայերեն|አማርኛ|ภาษาไทย ๑๒๓|தமிழ்|বাংলা ১২৩|ᏣᎳᎩ ꮳꮃꭹ|𐐀𐐨 deseret|𝔘𝔫𝔦𝔠𝔬𝔡𝔢|ⒶⒷ ⓐⓑ|Ⅷ ⅷ ¾ ² ₂|①②|١٢٣ ۱۲۳
😀|👩‍👩‍👧‍👦 family|🇩🇪🇫🇷|👍🏽|❤️|☺|🏴󠁧󠁢󠁥󠁮󠁧󠁿|a😀b|e\u0301 é|o\u0308\u0304|\u0345α\u0345|\u0301 alone|Z͑ͫ̓a͎l̋g͌o͐
it's|don't stop|we're they've I'm we'll he'd|IT'S|'s 't 're|''s|'ſ|rock 'n' roll|“curly” ‘quotes’|it’s|o'clock's|'
1234567890|3.14|1,000|2nd|x2y3|v1.2.3-rc1|50%|$5|#1|a+b=c|C++|a_b|__init__|a/b\\c|(a)[b]{c}|!!!|?!|...|…|---|—–
&amp;|&lt;b&gt;|&amp;amp;|&amp;amp;amp;|&eacute;|&#233;|&#xe9;|&nbsp;x|&notanentity;|&lt|&#0;|&#xD800;|a & b|AT&T|&#x1F600;|<b>bold</b> &amp;|<i> &amp;lt; &amp;amp;lt;
<start_of_text>|a <start_of_text> b|<END_OF_TEXT>|<end_of_text>x|<start_of_text><end_of_text>|<ſtart_of_text>|<|startoftext|>|</w>|a</w>b|<w>|<start_of_text|!<start_of_text>
  spaces   everywhere  |tab\there|new\nline|\r\n|\x00|a\x00b|\x07bell|\x1b[31mred\x1b[0m|\x1c\x1d\x1e\x1fx|\x85x|\u200bzero\u200bwidth|\ufeffbom
\u2028x\u2029|\xa0nbsp\xa0|\u3000wide|\u202ertl|soft\xadhyphen|\ufffd|\uffff|\U0010ffff|\ue000|\ud800|\udc00x|\ud83d\ude00|ﬁ ﬂ ﬃ|ｆｕｌｌｗｉｄｔｈ|Å Å|K k|Ω Ω
sÃ©jour|âœ” No problems|l’humanitÃ©|Ã¼ber|ðŸ˜€|schÃ¶n|â€œquotedâ€\x9d|The Mona Lisa doesnÃƒÂ¢Ã¢â€šÂ¬Ã¢â€žÂ¢t have eyebrows.|\x93x\x94|Ñ‚ÐµÑ�Ñ‚
http://example.com/a?b=c&d=e|me@example.com|@user #tag|IMG_2041.JPG|foo.bar.baz|aaaaaaaaaaaaaaaaaaaa|pneumonoultramicroscopicsilicovolcanoconiosis|zzzxqj|ab ab ab
!|! !|!!|a!|" " |'|~|`|^|*|\\|\x7f|0|00|a|A|z|é|日|🦊|the|The|of the|a. b.|Mr. O'Neill's dog|x²+y²=z²|°C|±5|№ 7|€ 10|¿qué?|«oui»"""  # noqa: E501
FIXED = ["", *(part for line in SCRIPTS.split("\n") for part in line.split("|"))]
FIXED += [
    "word " * 300,
    "日本" * 200,
    "!" * 300,
    "é " * 76,
    *("x " * n for n in range(74, 79)),
    "a " * 30 + "🦊" * 60,
]


def row(text: str, context_length: int = 77) -> list[int]:
    values: list[list[int]] = ClipTokenizer(context_length, "context_length")([text]).values.tolist()
    return values[0]


def test_fixed_texts_have_open_clips_ids():
    assert len(FIXED) > 200
    ours = ClipTokenizer(77, "context_length")(FIXED)
    theirs = PEER(FIXED)
    wrong = [text for text, a, b in zip(FIXED, ours.values, theirs) if not torch.equal(a, b)]
    assert wrong == []


@settings(max_examples=400, deadline=None)
@given(st.text(), st.integers(2, 20))
def test_any_text_has_open_clips_ids(text, context_length):
    assert row(text, context_length) == PEER([text], context_length)[0].tolist()


PIECES = st.sampled_from([text for text in FIXED if len(text) < 30]) | st.text(max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_texts_of_awkward_pieces_have_open_clips_ids(text):
    assert row(text) == PEER([text])[0].tolist()


def test_every_character_is_split_as_by_open_clip():
    # between a letter and a digit, so that a change of its class moves a word boundary
    points = [i for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    points = [i for i in points if i < 0x3100 or 0xA640 <= i < 0xAC00 or 0xFB00 <= i < 0x10800 or i % 41 == 0]
    for start in range(0, len(points), 64):
        text = "".join(f"a{chr(i)}b1{chr(i)}-" for i in points[start : start + 64])
        got = ClipTokenizer(2000, pad_multiple=1)([text]).values[0].tolist()
        assert got[1:-1] == PEER.encode(text), hex(points[start])


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_clip_decode_equals_open_clips_and_round_trips(text):
    ids = row(text, 400)
    kept = [i for i in PEER.encode(text)[:398] if i < 49406]
    if len(PEER.encode(text)) == len(kept):  # no special word inside
        assert ClipTokenizer().decode(ids) == PEER.decode(kept).strip()
    assert ClipTokenizer().decode(row("A photo, of a cat's café!", 20)) == "a photo , of a cat 's café !"


def test_padding_mask_and_special_ids():
    tokenizer = ClipTokenizer(10, pad_multiple=1)
    values, mask, lengths = tokenizer(["", "a cat", "a cat sat on the mat with eleven other cats"])
    assert lengths is not None and lengths.counts.tolist() == [2, 4, 10]
    assert values.dtype == torch.int64 and mask is not None and mask.dtype == torch.bool
    assert values.shape == mask.shape == (3, 10)
    assert values[0].tolist() == [49406, 49407] + [0] * 8 and mask.sum(1).tolist() == [2, 4, 10]
    assert values[2, -1] == tokenizer.eos_id and tokenizer.truncated == 1
    assert tokenizer(["", "a cat"]).values.shape == (2, 4)
    assert ClipTokenizer(10, "context_length")(["", "a cat"]).values.shape == (2, 10)
    assert tokenizer([]).values.shape == (0, 0)
    assert torch.equal(tokenizer("a cat").values, tokenizer(["a cat"]).values)
    assert tokenizer.vocab_size == 49408 and isinstance(tokenizer, Tokenizer)
    # "!" has the padding id where it does not end a word: only the mask and the end id tell them apart
    assert tokenizer.decode(tokenizer(["!x !!y"]).values[0].tolist()) == "! x !! y"


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_only_what_does_not_fit_is_cut(extra):
    for tokenizer, text in (
        (ClipTokenizer(8, pad_multiple=1), "a " * (6 + extra)),
        (ByteTokenizer(8, pad_multiple=1), "a" * (6 + extra)),
    ):
        values = tokenizer([text]).values
        assert tokenizer.truncated == (extra > 0)
        assert values.shape == (1, min(8 + extra, 8)) and values[0, -1] == tokenizer.eos_id


@settings(deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=4), st.integers(1, 40), st.integers(2, 40))
def test_texts_are_padded_to_a_multiple_that_fits_and_the_lengths_are_those_of_the_mask(texts, multiple, limit):
    values, mask, lengths = ByteTokenizer(limit, pad_multiple=multiple)(texts)
    assert mask is not None and lengths is not None
    assert mask.sum(1).tolist() == lengths.counts.tolist()
    assert bool((mask[:, :-1] | ~mask[:, 1:]).all())  # what is real comes first
    longest = max(lengths.counts)
    assert values.shape[1] == min(limit, next(n for n in range(longest, limit + 41) if n % multiple == 0))


@settings(deadline=None)
@given(st.text(max_size=60))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer(256, pad_multiple=1)
    values, mask, _ = tokenizer([text])
    assert values[0].tolist() == [1, *(3 + byte for byte in text.encode()), 2] and mask.all()
    assert tokenizer.decode([*values[0].tolist(), 0, 0]) == text


def test_bytes_of_a_lone_surrogate_and_of_a_cut_character():
    assert ByteTokenizer(8).decode(ByteTokenizer(8)(["a\ud800b"]).values[0].tolist()) == "a?b"
    assert ByteTokenizer(4).decode(ByteTokenizer(4)(["aé日"]).values[0].tolist()) == "a\ufffd"
    assert ByteTokenizer().vocab_size == 259


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.decoder = tokenizers.decoders.Fuse()
    specials = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=80, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["a photo of a cat", "a photo of a dog", "the cat sat"] * 5, trainer)
    # settings of the file that must not leak into ours
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]", length=30)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_hugging_face_file_or_folder(trained):
    for path in (trained, f"{trained}/tokenizer.json"):
        ours = HuggingFaceTokenizer(path, 12, eos_token="[EOS]", pad_token="[PAD]", start_token="[BOS]")
        texts = ["a photo of a cat", "", "the dog " * 9]
        values, mask, _ = ours(texts)
        reference = tokenizers.Tokenizer.from_file(f"{trained}/tokenizer.json")
        reference.enable_truncation(12)
        reference.enable_padding(pad_id=0, pad_token="[PAD]")
        expected = reference.encode_batch(texts)
        assert values.tolist() == [e.ids for e in expected]
        assert mask is not None and mask.int().tolist() == [e.attention_mask for e in expected]
        assert ours.truncated == 1 and ours.vocab_size == reference.get_vocab_size()
        assert ours.decode(values[0].tolist()) == "aphotoofacat"
        assert isinstance(ours, Tokenizer)


def test_hugging_face_without_start_and_with_shared_padding(trained):
    ours = HuggingFaceTokenizer(trained, 12, "[EOS]", "[EOS]")
    values, mask, _ = ours(["cat", "a photo"])
    assert ours.start_id is None and values[:, 0].min() > 3
    assert mask is not None and values[~mask].unique().tolist() in ([3], [])
    assert ours.decode(values[1].tolist()) == "aphoto"


def test_hugging_face_texts_can_be_cleaned_and_their_end_left_blank(trained):
    plain = HuggingFaceTokenizer(trained, 12, "[EOS]", "[PAD]", "[BOS]")
    clean = HuggingFaceTokenizer(trained, 12, "[EOS]", "[PAD]", "[BOS]", clean="canonicalize")
    assert clean(["The CAT, sat!"]).values.tolist() == plain(["the cat sat"]).values.tolist()
    blank = HuggingFaceTokenizer(trained, 12, "[EOS]", "[PAD]", "[BOS]", strip_sep_token=True)
    texts = ["a cat", "a photo of a dog " * 5]
    expected = plain(texts).values
    assert torch.equal(blank(texts).values, expected.masked_fill(expected == plain.eos_id, 0))
    with pytest.raises(InputError, match=r"clean='all'.*whitespace"):
        HuggingFaceTokenizer(trained, 12, "[EOS]", "[PAD]", clean="all")


def test_hugging_face_errors(trained, tmp_path):
    with pytest.raises(InputError, match=r"eos_token='</s>' is not in the vocabulary.*\[EOS\]"):
        HuggingFaceTokenizer(trained, 12, eos_token="</s>", pad_token="[PAD]")
    with pytest.raises(InputError, match=r"tokenizer.json"):
        HuggingFaceTokenizer(tmp_path, 12, eos_token="</s>", pad_token="[PAD]")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a tokenizer.json"):
        HuggingFaceTokenizer(tmp_path, 12, eos_token="</s>", pad_token="[PAD]")


@pytest.mark.parametrize("build", [ClipTokenizer, ByteTokenizer])
def test_bad_input(build):
    for length in (1, 0, -5, 2.0, True):
        with pytest.raises(InputError, match="context_length"):
            build(length)
    with pytest.raises(InputError, match=r"pad='max'.*longest, context_length"):
        build(8, "max")
    for multiple in (0, -8, 1.0, True):
        with pytest.raises(InputError, match="pad_multiple"):
            build(8, pad_multiple=multiple)
    for text in (b"bytes", None, 3, ["nested"]):
        with pytest.raises(InputError, match=rf"type {type(text).__name__}"):
            build(8)(["fine", text])
    with pytest.raises(InputError, match="the id 99999"):
        build(8).decode([99999])


def test_pickling(trained):
    for tokenizer in (ClipTokenizer(9), ByteTokenizer(9), HuggingFaceTokenizer(trained, 9, "[EOS]", "[PAD]")):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert torch.equal(copy(["a cat"]).values, tokenizer(["a cat"]).values)
    assert len(pickle.dumps(ClipTokenizer())) < 1000


FORK = """
import sys
from torch.utils.data import DataLoader
from mmpretrain.data.tokenizer import ClipTokenizer, HuggingFaceTokenizer
for tokenizer in (ClipTokenizer(), HuggingFaceTokenizer(sys.argv[1], 9, "[EOS]", "[PAD]")):
    before = tokenizer(["a cat", "a dog"]).values.tolist()
    options = {"num_workers": 1, "multiprocessing_context": "fork"}
    loader = DataLoader(["a cat", "a dog"], 2, collate_fn=tokenizer, **options)
    assert [batch.values.tolist() for batch in loader] == [before]
"""


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_workers_are_silent(trained):
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-c", FORK, trained]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
