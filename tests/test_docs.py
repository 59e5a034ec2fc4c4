"""Every example of the README and the documentation runs, and what they say about names and sizes is so."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from PIL import Image

from mmpretrain.cli import main
from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate
from mmpretrain.datasets import openmoji, openmoji_render

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
REASONS = {"installs packages", "needs SLURM", "needs several GPUs", "takes minutes"}
FENCE = re.compile(r"^```(\w*)[^\S\n]*(?:title=\"([^\"]+)\")?[^\S\n]*\n(.*?)^```[^\S\n]*$", re.M | re.S)
NOT_RUN = re.compile(r"<!-- not run: ([^>]*?) -->\s*\Z")
SHORT = {
    "scheduler.warmup_steps": "1",
    "data.global_batch_size": "8",
    "data.num_workers": "0",
    "report": "false",
}


class Block(NamedTuple):
    """A fenced block: where, in which language, as which file, and why it is not run."""

    line: int
    language: str
    file: str | None
    text: str
    not_run: str | None


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        reason = NOT_RUN.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(line, match[1], match[2], match[3], reason[1] if reason else None))
    return found


def short(arguments: list[str]) -> list[str]:
    """Make a training command a matter of seconds; a later override replaces an earlier one."""
    if arguments[:1] != ["train"] or "--cfg" in arguments:
        return arguments
    resumed = any(argument.startswith("resume=") for argument in arguments)
    limits = [f"trainer.max_steps={3 if resumed else 2}", *(f"{key}={value}" for key, value in SHORT.items())]
    often = [argument.split("=")[0] + "=1" for argument in arguments if "_every_n_steps=" in argument]
    return [*arguments, *limits, *often]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are quicker on one thread, far quicker where others use the machine too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with an OpenMoji of 300 pictures: rendering all takes longer than all the pages."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMPRETRAIN_CACHE", str(folder))
        patch.setattr(openmoji, "drawings", lambda limit: openmoji_render.drawings(limit or 300))
        openmoji.build()
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The smallest run of the demo, report and all."""
    folder = tmp_path_factory.mktemp("run") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMPRETRAIN_CACHE", str(cache))
        patch.delenv("MMPRETRAIN_RUN_ID", raising=False)
        assert main([*short(["train"]), f"run_dir={folder}", "report=true"]) == 0
    return folder


@pytest.fixture
def place(
    tmp_path: Path, run_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[pytest.MonkeyPatch]:
    """A folder to work in, with what the pages take for granted; imports from it are forgotten afterwards."""
    monkeypatch.setenv("MMPRETRAIN_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, name in enumerate(["cat", "dog"]):
        Path("pictures", name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (64, 48), (40 * i, 200 * number, 90)).save(f"pictures/{name}/{i}.jpg")
            Path(f"pictures/{name}/{i}.txt").write_text(f"{name} number {i}")
    Path("runs/openmoji_clip").mkdir(parents=True)
    Path("runs/openmoji_clip/latest").symlink_to(run_folder, target_is_directory=True)
    yield monkeypatch
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    shutil.rmtree("runs")  # checkpoints of 150 MB each


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, place: pytest.MonkeyPatch) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.file is not None:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.not_run is not None:
            assert block.not_run in REASONS, where
        elif block.language == "python":
            exec(compile(block.text, where, "exec"), names)
        elif block.language == "bash":
            for number, line in enumerate(block.text.replace("\\\n", " ").splitlines()):
                run_line(line, f"{where}, command {number}", place)
        elif block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            yaml.safe_load(block.text)
        else:
            assert block.language == "", f"{where}: {block.language} blocks are not known here"


def run_line(line: str, where: str, patch: pytest.MonkeyPatch) -> None:
    """Run one command: ours in this process, which saves the seconds that importing takes, others by bash."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"PYTHONPATH=\.", words[0]):  # the folder is on the path already
        words = words[1:]
    if not words:
        return
    if words[0] != "mmpretrain":
        subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True, timeout=300)
        return
    assert not {"|", ">", ";", "&&", "&"} & set(words), f"{where}: only plain commands of ours are run here"
    GlobalHydra.instance().clear()
    patch.setenv("MMPRETRAIN_RUN_ID", re.sub(r"\W+", "_", where))
    assert main(short(words[1:])) == 0, f"{where}: {line}"


def test_pages_are_in_the_navigation_and_links_lead_somewhere() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w-]+\.md", json.dumps(settings["nav"]))
    assert sorted(listed) == sorted(page.name for page in PAGES[1:])
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_docs_load_nothing_from_other_servers() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert settings["theme"]["font"] is False and settings["strict"] is True
    assert not {"extra_javascript", "extra_css", "extra"} & set(settings)


def test_the_models_of_the_readme_have_the_sizes_it_says() -> None:
    readme = PAGES[0].read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|", readme, re.M)
    assert {row[0] for row in rows} == {path.stem for path in (ROOT / "configs/model").glob("*.yaml")}
    register_resolvers()
    for name, *sizes in rows:
        tokenizer = {"siglip": "siglip", "coca": "coca"}.get(name.split("_")[0], "clip")
        with initialize_config_module("mmpretrain.configs", version_base="1.3"), torch.device("meta"):
            choices = ["experiment=image_text_clip", f"model={name}", f"tokenizer={tokenizer}", "data.image_size=64"]
            model = instantiate(compose("train", choices).model)
        parts = (model, model.encoders["image"], model.encoders["text"])
        counted = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
        assert [f"{count:.1f}" for count in counted] + [str(model.embed_dim)] == sizes, name


def test_groups_of_the_configuration_page_are_those_shipped() -> None:
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for group in (ROOT / "configs").iterdir():
        if group.is_dir() and group.name != "__pycache__":
            (row,) = re.findall(rf"^\|[^|]*`{group.name}`[^|]*\|.*$", text, re.M)
            for option in group.glob("*.yaml"):
                assert f"`{option.stem}`" in row, f"{group.name}={option.stem}"


def test_the_cluster_script_is_a_script() -> None:
    (script,) = (block.text for block in blocks(ROOT / "docs/distributed.md") if block.file == "train.sbatch")
    subprocess.run(["bash", "-n", "-c", script], check=True)


def test_make_lists_its_targets() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    listed = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=30).stdout
    assert set(re.findall(r"make (\w+)", listed)) == targets
