from __future__ import annotations

import json

import pytest
import torch

from mmpretrain import InputError
from mmpretrain.generation import Decoder, greedy_ids
from mmpretrain.interop import open_clip_beams
from mmpretrain.interop.converted import Converted, build
from mmpretrain.interop.names import to_ours
from mmpretrain.interop.open_clip_config import describe
from tests.interop.coca_captions import CONFIG, END, FILE, START, images, model

GOLDEN = json.loads(FILE.read_text())["captions"]


@pytest.fixture(scope="module")
def pair():
    theirs = model()
    described = describe(CONFIG, eos_id=END)
    weights = to_ours(theirs.state_dict(), described.table, "small CoCa")
    return theirs, build(Converted({"model": described.model}, weights, "small CoCa"))


def test_greedy_captions_follow_open_clips_logits(pair):
    theirs, ours = pair
    ids = torch.full((6, 1), START)
    with torch.no_grad():
        for _ in range(11):
            logits = theirs(images(), ids, output_labels=False)["logits"][:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    found = greedy_ids(Decoder(ours, images()), START, END, 0, 12)
    for expected, written in zip(ids.tolist(), found.tolist(), strict=True):
        end = expected.index(END) + 1 if END in expected else len(expected)
        assert written[:end] == expected[:end]


@pytest.mark.parametrize("case", GOLDEN, ids=[str(case["options"]) for case in GOLDEN])
def test_beams_are_those_that_open_clip_wrote(case, pair):
    renamed = {"seq_len": "max_length", "num_beam_groups": "num_groups", "min_seq_len": "min_length"}
    options = {renamed.get(name, name): value for name, value in case["options"].items()}
    found = open_clip_beams.beam_ids(Decoder(pair[1], images()), START, END, **options)
    assert found.tolist() == case["ids"]


def test_captions_of_the_fixture_differ_and_some_end_early():
    texts = [tuple(text) for text in GOLDEN[0]["ids"]]
    assert len(set(texts)) > 2
    assert len({text.index(END) for text in texts if END in text}) > 1


def test_groups_must_divide_the_beams(pair):
    with pytest.raises(InputError, match="not a multiple"):
        open_clip_beams.beam_ids(Decoder(pair[1], images()), START, END, num_beams=5, num_groups=2)
