"""Images a second on one core, from the bytes of a JPEG to the pixels of a training example.

    python -m benchmarks.image_path [--rounds 5] [--count 16] [--json]
    python -m benchmarks.image_path --decoders

Ours is the field that training uses, `Image(Augment(224))`, once exact and once with `decode="scaled"`; the peer is
open_clip's `image_transform(224, is_train=True)` on `PIL.Image.open` of the same bytes. Before anything is timed, the
pixels of both are compared on the same crops. `--decoders` compares decoders alone, the peers' where installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import importlib.util
import io
import random
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
import torch
from open_clip.transform import image_transform
from PIL import Image as PILImage

from benchmarks import _harness as harness
from mmpretrain.data.decode import Image
from mmpretrain.data.preprocess import Augment

SIZE = 224
SHORTEST = (256, 512, 1024)
TARGETS = {"exact": 2.5, "scaled": 4.0}
EQUAL, FARTHEST = 0.99, 2  # share of pixels that must be identical, levels that one may be off


def picture(index: int, short: int) -> bytes:
    """Return a JPEG of quality 90, 4:2:0, of a part of a photograph, 4:3 or upright, `short` pixels on a side.

    The parts are chosen so that a file has about as many bytes a pixel as one of a web data set scaled to that size.
    """
    from sklearn.datasets import load_sample_images

    generator = random.Random(index)
    photo = PILImage.fromarray(load_sample_images().images[index % 2])
    width, height = (short * 4 // 3, short) if generator.random() < 0.75 else (short, short * 4 // 3)
    scale = generator.uniform(0.25, 0.6) * min(photo.width / width, photo.height / height)
    left = generator.uniform(0, photo.width - scale * width)
    top = generator.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    made = photo.resize((width, height), PILImage.Resampling.BICUBIC, box)
    stream = io.BytesIO()
    made.save(stream, "JPEG", quality=90, subsampling="4:2:0")
    return stream.getvalue()


def theirs(transform: Callable[[PILImage.Image], torch.Tensor], data: bytes) -> torch.Tensor:
    return transform(PILImage.open(io.BytesIO(data)))


def ours(field: Image, data: bytes, seed: int) -> torch.Tensor:
    return field({"jpg": data}, torch.Generator().manual_seed(seed))


def compare(files: list[bytes]) -> tuple[float, float]:
    """Return the largest share of pixels that differ in a picture, and the largest difference, in levels."""
    augment = Augment(SIZE)
    field, transform = Image(augment), image_transform(SIZE, is_train=True, mean=(0, 0, 0), std=(1, 1, 1))
    shares, levels = [], []
    for seed, data in enumerate(files):
        draws = torch.Generator().manual_seed(seed)
        left, top, width, height = augment.crop(*PILImage.open(io.BytesIO(data)).size, draws)
        transform.transforms[0].get_params = lambda *_, box=(top, left, height, width): box
        expected = (theirs(transform, data) * 255).round().int()
        difference = (ours(field, data, seed).int() - expected).abs()
        shares.append((difference > 0).double().mean().item())
        levels.append(difference.max().item())
    return max(shares), max(levels)


def rate(work: Callable[[bytes, int], object], files: list[bytes], repeat: int) -> float:
    """Return pictures a second."""

    def all_files() -> None:
        for seed, data in enumerate(files):
            work(data, seed)

    return len(files) / harness.seconds(all_files, repeat)


def decoders() -> dict[str, Callable[[bytes], Any]]:
    """Decoders of a whole JPEG to RGB in memory that torch can use, those that are installed."""
    found: dict[str, Callable[[bytes], Any]] = {
        "pillow": lambda data: np.array(PILImage.open(io.BytesIO(data))),
        "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, "RGB"),
    }
    warnings.simplefilter("ignore")  # torchvision deprecates its decoders
    from torchvision.io import decode_jpeg

    found["torchvision"] = lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if importlib.util.find_spec("torchcodec"):
        from torchcodec.decoders import decode_jpeg as decode

        found["torchcodec"] = lambda data: decode(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if importlib.util.find_spec("turbojpeg"):
        import turbojpeg

        try:
            decoder = turbojpeg.TurboJPEG()
        except RuntimeError as error:
            harness.note(f"PyTurboJPEG: {error}")
        else:
            found["PyTurboJPEG"] = lambda data: decoder.decode(data, pixel_format=turbojpeg.TJPF_RGB)
    return found


def compare_decoders(rounds: int, count: int) -> None:
    sides = decoders()
    print("| decoder | version | " + " | ".join(f"{short} px" for short in SHORTEST) + " |")
    print("| --- | --- |" + " --- |" * len(SHORTEST))
    table: dict[str, list[str]] = {name: [] for name in sides}
    for short in SHORTEST:
        files = [picture(i, short) for i in range(count)]
        expected = [sides["pillow"](data) for data in files]
        for name, decode in sides.items():
            for data, right in zip(files, expected, strict=True):
                got = np.asarray(decode(data))
                if not np.array_equal(got if got.shape[-1] == 3 else got.transpose(1, 2, 0), right):
                    raise SystemExit(f"{name} gives other pixels")
        timed = {
            name: functools.partial(rate, lambda data, _, decode=decode: decode(data), files, 2)
            for name, decode in sides.items()
        }
        found = harness.alternate(timed, rounds)
        for name, rates in found.items():
            ratio = statistics.median(a / b for a, b in zip(rates, found["pillow"], strict=True))
            table[name].append(f"{statistics.median(rates):,.0f}/s, {ratio:.2f}x")
    for name, cells in table.items():
        print(f"| {name} | {importlib.metadata.version(name)} | {' | '.join(cells)} |")


def main() -> None:
    parser: argparse.ArgumentParser = harness.parser(__doc__, threads=1)
    parser.add_argument("--count", type=int, default=16, help="pictures of each size")
    parser.add_argument("--decoders", action="store_true", help="compare decoders alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.decoders:
        compare_decoders(args.rounds, args.count)
        return
    fields = {mode: Image(Augment(SIZE), decode=mode) for mode in ("exact", "scaled")}
    transform = image_transform(SIZE, is_train=True)
    rows, checked, means = [], {}, []
    for short in SHORTEST:
        files = [picture(i, short) for i in range(args.count)]
        means.append(f"{short} px {statistics.mean(map(len, files)) / 1000:.0f} kB")
        share, levels = compare(files)
        name = f"{short} px:"
        checked |= harness.check({f"{name} share of other pixels": (share, 1 - EQUAL), "levels": (levels, FARTHEST)})
        checked[f"{name} largest difference in levels"] = checked.pop("levels")
        repeat = max(1, 1024 // short)
        found = harness.alternate(
            {
                **{
                    mode: functools.partial(rate, functools.partial(ours, f), files, repeat)
                    for mode, f in fields.items()
                },
                "open_clip": functools.partial(rate, lambda data, _: theirs(transform, data), files, repeat),
            },
            args.rounds,
        )
        for mode in fields:
            title = f"{short} px, {'near-exact' if mode == 'exact' else mode}"
            rows.append(
                harness.Row(title, "images/s", found[mode], found["open_clip"], "open_clip", target=TARGETS[mode])
            )
    harness.finish(
        harness.Report(
            "image_path",
            rows,
            checked,
            ["torch", "torchvision", "pillow", "simplejpeg", "open_clip_torch"],
            {"pictures of each size": args.count, "mean bytes": ", ".join(means)},
            [
                "Both sides end with what they give to a batch: ours with uint8 pixels, which the device normalises; "
                "open_clip with normalised float32.",
                "Scaled is approximate. At 256 px no smaller decoding leaves 224 pixels: both modes do the same there.",
            ],
        ),
        args.json,
    )


if __name__ == "__main__":
    main()
