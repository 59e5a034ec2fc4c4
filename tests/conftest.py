"""Shared by all tests: few threads, no network."""

import os

# Small tensors gain nothing from more, and two busy processes of two threads each take four times as long.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import torch

torch.set_num_threads(1)

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests.shard_sets import OVERRIDES, write_pictures  # noqa: E402


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 4 shards with 64 real PNG pictures: a coloured half, captioned 'red left' and so on."""
    return write_pictures(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def tiny(shards: Path) -> list[str]:
    """Overrides that make any image-text experiment a tiny one on those shards."""
    return [*OVERRIDES, f"data.train={shards}", f"data.val={shards}", "evaluators=image_text", "report=false"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that no process ends with one alone; a file goes to one process."""
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)
