"""The GPU set: what one GPU gives, ours beside the peers', in under 9 minutes on an H100.

    python -m benchmarks.gpu [--only train_step contrastive_memory end_to_end] [--models ViT-B-32 ...] [--json]

Writes benchmarks/results/<date>-<GPU>.md after every part, so that a run that is cut short keeps what it measured.
`--device cpu --smoke` goes through all of it with tiny sizes, to try the code; its numbers mean nothing.

| part | what |
| --- | --- |
| train_step | one training step of five models: samples/s, MFU, peak memory; open_clip eager and compiled |
| end_to_end | ViT-B/32 from JPEG shards against synthetic input (follows ViT-B/32's train_step, whose model it uses) |
| contrastive_memory | the losses at 8k to 262k pairs: peak bytes, ms, error; open_clip, inf-cl, siglip-kernel |
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import _gpu, gpu_contrastive, gpu_end_to_end, gpu_train_step
from benchmarks import _harness as harness

PARTS = ("train_step", "contrastive_memory", "end_to_end")
ORDER = ("ViT-B-32", "coca_ViT-B-32", "ViT-B-16", "contrastive_memory", "ViT-L-14", "coca_ViT-L-14")
"""Those with targets first: what there is no time for is at the end."""
NEEDED = {
    "train_step": ("open_clip", "timm", "ftfy", "regex"),
    "contrastive_memory": ("open_clip", "ftfy", "regex"),
    "end_to_end": (
        "open_clip",
        "timm",
        "ftfy",
        "regex",
        "lightning",
        "braceexpand",
        "sklearn",
        "xxhash",
        "fsspec",
        "simplejpeg",
    ),
}
PEERS = ("inf_cl", "siglip_kernel")
"""Run on CUDA alone, and needed there by contrastive_memory."""
SMOKE = {
    "models": ["tiny_vocab", "tiny_coca"],
    "batch": 8,
    "compared": 4,
    "rounds": 1,
    "least_steps": 1,
    "turn": 0.01,
    "texts": 2,
    "sizes": [32, 64],
    "width": 16,
    "tile": 16,
    "tolerance": 0.1,
    "pictures": 32,
    "workers": 0,
    "feed_seconds": 0.01,
    "backend": "eager",
    "threads": 1,
}


def arguments() -> argparse.ArgumentParser:
    made = harness.parser(__doc__)
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run")
    made.add_argument("--models", nargs="+", default=[name for name in ORDER if name != "contrastive_memory"])
    made.add_argument("--device", default="cuda")
    made.add_argument("--budget", type=float, default=530, help="seconds for everything; what is left then is skipped")
    made.add_argument("--compile-limit", type=float, default=150, help="seconds that both sides may compile")
    made.add_argument("--peak-tflops", type=float, default=_gpu.PEAK_TFLOPS, help="what MFU is a share of")
    made.add_argument("--batch", type=int, help="samples of a step, for every model")
    made.add_argument("--compared", type=int, default=32, help="samples that both sides' gradients are compared with")
    made.add_argument("--turn", type=float, default=gpu_train_step.TURN, help="seconds of steps in a turn, about")
    made.add_argument("--least-steps", type=int, default=2)
    made.add_argument("--texts", type=int, default=4, help="batches of texts that are gone through in turn")
    made.add_argument("--backend", default="inductor", help="of torch.compile")
    made.add_argument("--by-block", action="store_true", help="compile our model block by block: ready much sooner")
    made.add_argument("--sizes", type=int, nargs="+", default=list(gpu_contrastive.SIZES), help="pairs of the losses")
    made.add_argument("--width", type=int, default=gpu_contrastive.WIDTH, help="dimensions of a pair's vectors")
    made.add_argument("--tile", type=int, default=4096, help="rows of the reference's tiles")
    made.add_argument("--tolerance", type=float, default=0.03, help="largest relative error of a loss's gradients")
    made.add_argument("--pictures", type=int, default=8192, help="pictures of the shards")
    made.add_argument("--workers", type=int, default=max(1, harness.cores() - 1), help="loading processes")
    made.add_argument("--feed-seconds", type=float, default=3.0, help="how long the loader is measured in a turn")
    made.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="folder of the table")
    made.add_argument("--smoke", action="store_true", help="tiny sizes, in one process")
    return made


def check_packages(only: list[str], device: str) -> None:
    """Refuse at once where something is missing."""
    modules = {module for part in only for module in NEEDED[part]}
    if device != "cpu" and "contrastive_memory" in only:
        modules |= set(PEERS)
    absent = sorted(_gpu.missing(modules))
    if absent:
        raise SystemExit(
            f"missing: {', '.join(absent)}. Where there is a network: pip install {' '.join(absent)}. Where there is "
            f"none, carry them: docs/benchmarks.md, 'A machine without a network'"
        )


class Results:
    """The reports so far, written out after each."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{datetime.date.today().isoformat()}-{_gpu.slug(harness.machine()['device'])}.md"
        self.reports: list[harness.Report] = []
        self.skipped: list[str] = []
        self.failed = False
        self.start = time.monotonic()

    def add(self, part: str, measure: Callable[[], harness.Report]) -> bool:
        """Measure one part and write everything; a part that fails is named, and the others go on."""
        begun, before = time.monotonic(), len(self.reports)
        try:
            self.reports.append(measure())
        except _gpu.OutOfTime:
            self.skipped.append(f"{part}: not measured, the time was up.")
        except (SystemExit, Exception) as error:  # an hour of a GPU is not lost to one part
            harness.note(traceback.format_exc())
            self.failed = True
            self.skipped.append(f"{part}: not measured: {error}")
        harness.note(f"{part}: {time.monotonic() - begun:.0f} s, {time.monotonic() - self.start:.0f} s in all")
        self.write()
        return len(self.reports) > before

    def skip(self, part: str) -> None:
        """Name a part that there is no time for."""
        self.skipped.append(f"{part}: not measured, the time was up.")
        self.write()

    def write(self) -> None:
        """Write the file anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(self.markdown() + "\n", encoding="utf-8")

    def markdown(self) -> str:
        """Everything measured, and what was not."""
        head = [f"# {harness.machine()['device']}", "", "Made by `python -m benchmarks.gpu`.", ""]
        return "\n".join(head) + "\n" + "\n\n".join([*(r.markdown() for r in self.reports), *self.skipped])

    def as_json(self) -> dict[str, object]:
        """The same as one object."""
        return {"benchmarks": [report.as_json() for report in self.reports], "skipped": self.skipped}


def steps(given: argparse.Namespace, name: str, keeper: _gpu.Keeper, results: Results, clock: _gpu.Clock) -> None:
    """Measure one model's step, and from shards where it is the model for that."""
    done = results.add(f"train_step {name}", lambda: gpu_train_step.measured(keeper.sides(), name, given, clock))
    fed = gpu_end_to_end.MODEL if gpu_end_to_end.MODEL in given.models else given.models[0]
    if done and "end_to_end" in given.only and name == fed:
        batch = results.reports[-1].settings["batch"]
        with tempfile.TemporaryDirectory() as folder:
            shards = gpu_end_to_end.write_shards(Path(folder), given.pictures, 1 if given.smoke else harness.cores())
            done = results.add(
                "end_to_end", lambda: gpu_end_to_end.measured(keeper.sides(), name, shards, given, batch, clock)
            )
    if not done:
        keeper.close()  # whatever state they are in


def losses(given: argparse.Namespace, results: Results, clock: _gpu.Clock) -> None:
    """Measure the contrastive and the sigmoid losses."""
    for kind, share in (("clip", 0.6), ("sigmoid", 1.0)):
        own = _gpu.Clock(clock.left() * share)
        results.add(f"contrastive_memory {kind}", lambda kind=kind, own=own: gpu_contrastive.measured(given, own, kind))  # type: ignore[misc]


def main() -> None:
    made = arguments()
    if made.parse_args().smoke:
        made.set_defaults(**SMOKE)
    given = made.parse_args()
    check_packages(given.only, given.device)
    if given.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; --device cpu --smoke tries the code without one")
    torch.set_num_threads(given.threads)
    results, clock = Results(given.results), _gpu.Clock(given.budget)
    todo = [name for name in ORDER if name in given.models] + [name for name in given.models if name not in ORDER]
    if "contrastive_memory" in given.only:
        todo.insert(min(3, len(todo)), "contrastive_memory")
    with contextlib.closing(_gpu.Keeper(_gpu.Local if given.smoke else _gpu.Side, gpu_train_step.Trainee)) as keeper:
        for part in todo:
            if clock.left() < 20:
                results.skip(part)
            elif part == "contrastive_memory":
                losses(given, results, _gpu.Clock(min(90.0, clock.left())))
            elif "train_step" in given.only or part == gpu_end_to_end.MODEL:
                steps(given, part, keeper, results, clock)
    print(json.dumps(results.as_json()) if given.json else results.markdown())
    if results.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
