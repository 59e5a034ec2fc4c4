"""Held-out recall@1 (caption to picture) against the clock: `mmpretrain train` against open_clip's own trainer.

    python -m benchmarks.time_to_recall [--minutes 4] [--rounds 1] [--json]

Both read the same shards (OpenMoji's pictures and English names), train a model of the same size (ViT of 64 pixels in
patches of 8, 4 blocks, 3 text blocks, width 192) on the same cores, and are started as a user starts them. open_clip
trains for about `--minutes`, its schedule ending there; ours runs a shorter schedule. Time counts from the start of
the process, imports included. Both save a checkpoint now and then, which costs both their time; none evaluates while
it trains. Afterwards one function embeds the same pictures and captions with each checkpoint, by the preprocessing of
its own library, and ranks them.

The two recipes differ, see the note under the table. open_clip's is AdamW with betas 0.9 and 0.98, cosine, bfloat16
autocast, and what suits a short run: a higher rate, warm-up of 20 steps, gradients clipped, the patch dropout of ours.
`--peer "--lr 2e-3 ..."` and `--ours "experiment=... optimizer.lr=..."` try others; `--only peer --epochs 5` prints the
curve of one side.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import _harness as harness
from benchmarks import _peer

# open_clip pads every caption to the context length, so it gets one that just holds the longest (21 ids).
MODEL: dict[str, Any] = {
    "embed_dim": 192,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 192, "head_width": 64},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 3},
}
BATCH = 256
OURS = "experiment=openmoji_clip callbacks.checkpoint_every_n_steps=10"
PEER = "--lr 1e-3 --wd 0.2 --warmup 20 --grad-clip-norm 1.0 --force-patch-dropout 0.5 --workers 1"
LAUNCH = """
import sys, open_clip
open_clip.add_model_config(sys.argv[1])
from open_clip_train.main import main
main(sys.argv[2:])
"""


class Point(NamedTuple):
    """The recall of one checkpoint, `seconds` after the start."""

    seconds: float
    recall: float


class Held(NamedTuple):
    """The pictures held out (PIL) and their captions."""

    pictures: list[Any]
    captions: list[str]


def data() -> tuple[str, Held, int]:
    """Return the pattern of the training shards, what is held out, and the number of training samples."""
    import io

    import webdataset
    from PIL import Image

    from mmpretrain.data.shards import Shard, iter_shard
    from mmpretrain.datasets.openmoji import build

    root, place = build(), _peer.cache() / "openmoji"
    pattern = str(place / "{00000..00007}.tar")
    if not (place / "made").is_file():  # our shards, with the caption as open_clip wants it beside them
        place.mkdir(parents=True, exist_ok=True)
        for path in sorted((root / "train").glob("*.tar")):
            with webdataset.TarWriter(str(place / path.name), encoder=False) as writer:
                for sample in iter_shard(path):
                    writer.write({**sample, "txt": json.loads(sample["json"])["names"]["en"].encode()})
        (place / "made").touch()
    samples = list(iter_shard(root / "test" / "00000.tar"))
    pictures = [Image.open(io.BytesIO(sample["webp"])).convert("RGB") for sample in samples]
    captions = [json.loads(sample["json"])["names"]["en"] for sample in samples]
    return pattern, Held(pictures, captions), sum(len(Shard(path)) for path in sorted(place.glob("*.tar")))


def recall(images: Any, texts: Any) -> float:
    """Return the share of captions, rows of `texts` (N,E), whose own picture, row of `images`, is the nearest."""
    from torch.nn.functional import normalize

    from mmpretrain.evaluation.retrieval import rank_of_best

    ranks = rank_of_best(normalize(texts.float()), normalize(images.float()), [[i] for i in range(len(texts))])
    return float((ranks < 1).float().mean())


def run(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> float:
    """Run a trainer to its end and return when it began; its output goes to a file, the end of which is shown if it
    fails."""
    log, start = folder / "log.txt", time.time()
    with log.open("w") as stream:
        done = subprocess.run([sys.executable, *command], env=dict(environment), stdout=stream, stderr=stream)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} ended with {done.returncode}:\n{log.read_text()[-3000:]}")
    return start


def train_peer(
    shards: str, samples: int, epochs: int, every: int, options: str, folder: Path
) -> list[tuple[float, Path]]:
    """Run open_clip's trainer; return its checkpoints with the seconds after which each was written."""
    config = folder / "tiny.json"
    config.write_text(json.dumps(MODEL))
    command = ["-c", LAUNCH, str(config), "--model", "tiny", "--device", "cpu", "--precision", "amp_bf16"]
    command += ["--train-data", shards, "--dataset-type", "webdataset", "--train-num-samples", str(samples)]
    command += ["--batch-size", str(BATCH), "--epochs", str(epochs), "--save-frequency", str(every)]
    command += ["--logs", str(folder), "--name", "run", *shlex.split(options)]
    start = run(command, _peer.environment(True), folder)
    found = sorted((folder / "run" / "checkpoints").glob("epoch_*.pt"), key=lambda path: path.stat().st_mtime)
    return [(path.stat().st_mtime - start, path) for path in found]


def embed_peer(path: Path, held: Held, folder: Path) -> float:
    """Return the recall of an open_clip checkpoint."""
    import open_clip
    import torch

    open_clip.add_model_config(folder / "tiny.json")
    model, _, preprocess = open_clip.create_model_and_transforms("tiny", device="cpu")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["state_dict"])
    model.eval()
    with torch.inference_mode():
        images = model.encode_image(torch.stack([preprocess(picture) for picture in held.pictures]))
        texts = model.encode_text(open_clip.get_tokenizer("tiny")(held.captions))
        return recall(images, texts)


def train_ours(shards: str, options: str, folder: Path) -> list[tuple[float, Path]]:
    """Run `mmpretrain train`; return as `train_peer` does."""
    command = ["-m", "mmpretrain", "train", f"run_dir={folder / 'run'}", "data.module.prepare=null", "report=false"]
    command += [f"data.module.sources.image_text.shards='{shards}'", "evaluators=none", "data.card=null"]
    command += ["callbacks.checkpoints.keep=1000", f"data.global_batch_size={BATCH}", *shlex.split(options)]
    start = run(command, _peer.environment(False), folder)
    found = sorted((folder / "run" / "checkpoints").glob("step_*"))
    return [(path.stat().st_mtime - start, path) for path in found]


def embed_ours(path: Path, held: Held, folder: Path) -> float:
    """Return the recall of a checkpoint of ours."""
    import torch

    from mmpretrain.pretrained import load
    from mmpretrain.training.checkpoint import load as load_checkpoint

    model, preprocess, tokenizer = load(folder / "run" / "model")
    state = load_checkpoint(path)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()})
    with torch.inference_mode():
        images = model.embed("image", torch.stack([preprocess(picture) for picture in held.pictures]))
        return recall(images, model.embed("text", tokenizer(held.captions)))


def curve(checkpoints: Sequence[tuple[float, Path]], score: Callable[[Path], float]) -> list[Point]:
    """Score every checkpoint."""
    return [Point(round(seconds, 1), round(score(path), 4)) for seconds, path in checkpoints]


def reached(points: Sequence[Point], wanted: float) -> float:
    """Return when a curve first is at `wanted` or above."""
    return next(point.seconds for point in points if point.recall >= wanted)


def compared_at(ours: Sequence[Point], peer: Sequence[Point]) -> tuple[float, str]:
    """Return the recall at which both are compared, the peer's last or less where ours never got there, and which."""
    final, best = peer[-1].recall, max(point.recall for point in ours)
    if best >= final:
        return final, "open_clip's last"
    return best, f"ours never reached open_clip's last, {final:.1%}"


def plan(seconds: float, epochs_timed: Sequence[tuple[float, Path]]) -> int:
    """Return how many epochs fit into `seconds`, from the checkpoints of a short run."""
    first, last = epochs_timed[0][0], epochs_timed[-1][0]
    return max(1, int((seconds - first) / ((last - first) / (len(epochs_timed) - 1))) + 1)


def main() -> None:
    made = harness.parser(__doc__, rounds=1)
    made.add_argument("--minutes", type=float, default=4, help="how long open_clip trains")
    made.add_argument("--epochs", type=int, help="epochs of open_clip instead of --minutes")
    made.add_argument("--steps", type=int, default=150, help="steps of ours")
    made.add_argument("--ours", default=OURS, help="overrides of mmpretrain train")
    made.add_argument("--peer", default=PEER, help="options of open_clip_train.main")
    made.add_argument("--only", choices=["ours", "peer"], help="print the curve of one side and stop")
    given = made.parse_args()
    import torch

    options = f"{given.ours} trainer.max_steps={given.steps}"
    torch.set_num_threads(given.threads)
    shards, held, samples = data()
    times: dict[str, list[float]] = {"ours": [], "peer": []}
    curves: dict[str, list[Point]] = {}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            for name in ("timing", "peer", "ours"):
                (place / name).mkdir()
            wanted = 0.0
            if given.only != "ours":
                epochs = given.epochs
                if not epochs:
                    harness.note("time_to_recall: open_clip, two epochs to see how many fit")
                    epochs = plan(given.minutes * 60, train_peer(shards, samples, 2, 1, given.peer, place / "timing"))
                harness.note(f"time_to_recall: open_clip, {epochs} epochs")
                saved = train_peer(shards, samples, epochs, max(1, epochs // 6), given.peer, place / "peer")
                curves["peer"] = curve(saved, partial(embed_peer, held=held, folder=place / "peer"))
                harness.note(f"time_to_recall: open_clip: {[tuple(point) for point in curves['peer']]}")
                wanted = curves["peer"][-1].recall
            if given.only != "peer":
                harness.note(f"time_to_recall: ours, to recall@1 of {wanted:.1%}")
                saved = train_ours(shards, options, place / "ours")
                curves["ours"] = curve(saved, partial(embed_ours, held=held, folder=place / "ours"))
                harness.note(f"time_to_recall: ours: {[tuple(point) for point in curves['ours']]}")
            if given.only:
                continue
            level, which = compared_at(curves["ours"], curves["peer"])
            for name, points in curves.items():
                times[name].append(reached(points, level))
    if given.only:
        return
    rows = [
        harness.Row(
            f"time to recall@1 of {level:.1%} ({which})",
            "s",
            times["ours"],
            times["peer"],
            "open_clip_train",
            more_is_better=False,
            target=4.0 if level == curves["peer"][-1].recall else None,
        )
    ]
    notes = [
        f"{side}, (seconds, recall@1): " + ", ".join(f"({seconds:.0f}, {share:.1%})" for seconds, share in points) + "."
        for side, points in (("mmpretrain", curves["ours"]), ("open_clip", curves["peer"]))
    ]
    settings = {
        "rounds": given.rounds,
        "training pictures": samples,
        "batch": BATCH,
        "mmpretrain": f"`{options}`",
        "open_clip": f"`{given.peer}`",
        "webdataset of open_clip": _peer.WEBDATASET,
    }
    packages = ["torch", "open_clip_torch", "lightning", "timm"]
    notes.append(
        f"Recipes and speed together, over {len(held.captions)} held-out pictures: ours trains with Muon and counts "
        "equal captions as positives (chosen on these pictures, see docs/recipe.md), open_clip trains with AdamW. "
        "Both times are of the first checkpoint at or above the recall that open_clip ends with."
    )
    harness.finish(harness.Report("time_to_recall", rows, {}, packages, settings, notes), given.json)


if __name__ == "__main__":
    main()
