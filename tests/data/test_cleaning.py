from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn

from mmpretrain.data.cleaning import CLEANERS

TEXTS = [
    "A  photo, of_a &amp;lt; CAT!",
    "caf\u00c3\u00a9 \u201cquoted\u201d",
    "",
    " \t\n ",
    "it's 5_6 -- (7)",
    "\u0130\u00df\ufb01",
]


@pytest.mark.parametrize("kind", ["whitespace", "lower", "canonicalize"])
@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TEXTS) | st.text(max_size=40))
def test_texts_are_cleaned_as_open_clip_cleans_them(kind, text):
    assert CLEANERS[kind](text) == get_clean_fn(kind)(text)


def test_nothing_is_done_to_a_text_unless_asked_for():
    assert CLEANERS["none"](" A, b ") == " A, b "
