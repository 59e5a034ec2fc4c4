from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmpretrain.interop.open_clip_coverage import COMPARED, check
from mmpretrain.interop.open_clip_in import config_files

PAGE = Path(__file__).parents[2] / "docs" / "open_clip-models.md"
SOME = ["ViT-B-32", "ViT-M-16-alt", "RN50", "MobileCLIP2-S0", "coca_base", "coca_roberta-ViT-B-32", "roberta-ViT-B-32"]


def lines() -> dict[str, str]:
    found = (line for line in PAGE.read_text(encoding="utf-8").splitlines(keepends=True) if line.startswith("| "))
    return {line.split(" | ")[0].removeprefix("| "): line for line in list(found)[2:]}


@pytest.mark.parametrize("name", SOME)
def test_the_table_says_what_a_check_finds(name):
    config = json.loads(config_files()[name].read_text(encoding="utf-8"))
    assert check(name, config).line() == lines()[name]


def test_the_table_has_every_packaged_config_and_those_that_must_convert_do():
    table = lines()
    assert table.keys() == config_files().keys()
    assert all("| yes | " in table[name] and "embeddings" in table[name] for name in COMPARED)
    refused = {name for name, line in table.items() if "| yes | " not in line}
    assert refused == {"coca_roberta-ViT-B-32"}
