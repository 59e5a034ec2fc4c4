"""Hostile shards: pickled members, addresses that are commands, servers that send us elsewhere."""

from __future__ import annotations

import http.server
import io
import json
import os
import pickle
import tarfile
import threading
from argparse import Namespace
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from mmpretrain.data.cache import fetch
from mmpretrain.data.decode import DecodeError, Image, JsonValue, Npy, TextCaption
from mmpretrain.data.events import DataEvent
from mmpretrain.data.preprocess import Preprocess
from mmpretrain.data.shards import Shard, iter_shard
from tests.faults.hostile import Case

PICKLES = ("pkl", "pickle", "pyd", "pth", "pt", "ckpt", "bin", "npy", "npz", "joblib", "json", "txt", "jpg", "py")


class Payload:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def pickled(marker: Path, extension: str = "pkl") -> bytes:
    data = io.BytesIO()
    if extension == "npy":
        np.save(data, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    elif extension == "npz":
        np.savez(data, a=np.array([Payload(marker)], dtype=object))
    elif extension == "pt":
        torch.save(Payload(marker), data)
    elif extension == "pth":
        torch.save(Payload(marker), data, _use_new_zipfile_serialization=False)
    else:
        return pickle.dumps(Payload(marker))
    return data.getvalue()


def picture() -> bytes:
    data = io.BytesIO()
    PILImage.new("RGB", (32, 32), (200, 10, 10)).save(data, "PNG")
    return data.getvalue()


def write(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def poison(extension: str, folder: Path) -> None:
    """Write a sound sample with one pickled member more."""
    data = pickled(folder / "marker", extension)
    write(folder / "x.tar", {"a.png": picture(), "a.txt": b"a cat", f"a.extra.{extension}": data})


def events_of(events: Iterable[DataEvent]) -> str:
    found = list(events)
    assert all(event.detail and event.shard for event in found)
    return f"event: {len(found)} x {', '.join(sorted({event.cause for event in found}))}" if found else ""


def read_every_way(extension: str, folder: Path) -> str:
    """Read the sample as training does, then name the pickled member as each kind of field."""
    generator = torch.Generator()
    refused = []
    for sample in iter_shard(folder / "x.tar", []):
        Image(Preprocess(8), extensions=("png",))(sample, generator)
        TextCaption()(sample, generator)
        name = f"extra.{extension}"
        for field in (Image(Preprocess(8), name), TextCaption(name), JsonValue(name), Npy(name)):
            try:
                field(sample, generator)
            except DecodeError as error:
                refused.append(error.cause)
            else:
                raise AssertionError(f"{type(field).__name__} read a pickle")
    assert len(refused) == 4
    return f"event: {', '.join(sorted(set(refused)))}"


def with_webdataset(path: str) -> str:
    import webdataset

    for sample in webdataset.WebDataset(path, shardshuffle=False, empty_check=False).decode("pilrgb"):
        return f"read: {', '.join(key for key in sample if not key.startswith('__'))}"
    return "read: nothing"


def with_open_clip(path: str) -> str:
    """Its training pipeline, warnings of a sample logged and the sample left out, as it is used."""
    import open_clip
    from open_clip_train.data import get_wds_dataset

    arguments = Namespace(val_data=path, val_num_samples=1, seed=0, workers=0, batch_size=1, world_size=1)
    transform = open_clip.transform.image_transform(32, is_train=False)
    info = get_wds_dataset(arguments, transform, is_train=False, tokenizer=open_clip.get_tokenizer("ViT-B-32"))
    for _ in info.dataloader:
        return "read: a batch"
    return "read: nothing"


PEERS = {
    "webdataset": lambda folder: with_webdataset(str(folder / "x.tar")),
    "open_clip": lambda folder: with_open_clip(str(folder / "x.tar")),
}


def fetched(address: str, folder: Path) -> str:
    Shard(address.replace("MARKER", str(folder / "marker")), folder / "cache")
    return "read: it"


COMMANDS = {
    "webdataset": lambda folder: with_webdataset(f"pipe:touch {folder / 'marker'}"),
    "open_clip": lambda folder: with_open_clip(f"pipe:touch {folder / 'marker'}"),
}


ADDRESSES = {
    "pipe:": "pipe:touch MARKER",
    "PIPE: in capitals": "PIPE:touch MARKER",
    "pipe://": "pipe://touch MARKER",
    "hf: as webdataset writes it": "hf:datasets/x/y.tar; touch MARKER",
    "a chain of addresses": "simplecache::pipe:touch MARKER",
    "ftp://": "ftp://127.0.0.1:1/x.tar",
    "data:": "data:application/x-tar;base64,AAAA",
    "file: of another host": "file://example.org/x.tar",
    "a command as a path": "x.tar; touch MARKER",
    "a command in backticks": "`touch MARKER`.tar",
}

REDIRECTS = {
    "to a file": "file:///etc/passwd",
    "to ftp": "ftp://127.0.0.1/x.tar",
    "to cloud metadata": "http://169.254.169.254/latest/meta-data/",
    "to another port of this machine": "http://127.0.0.1:1/x.tar",
    "to localhost as a number": "http://2130706433:1/x.tar",
    "to IPv6 localhost": "http://[::1]:1/x.tar",
    "to itself for ever": "/x.tar",
    "to a name with a line break": "http://127.0.0.1/\tx.tar",
    "to a command": "pipe:touch marker",
}


class _Redirect(http.server.BaseHTTPRequestHandler):
    location = ""

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", self.location)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


def redirected(location: str, folder: Path) -> str:
    handler = type("Handler", (_Redirect,), {"location": location})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    path = fetch(f"http://127.0.0.1:{server.server_port}/x.tar?token=hunter2", folder / "cache")
    return f"read: {json.dumps(path.read_text()[:20])}"


CASES = [
    *(
        Case(
            f"pickled member .{extension}",
            partial(read_every_way, extension),
            PEERS,
            prepare=partial(poison, extension),
        )
        for extension in PICKLES
    ),
    *(
        Case(f"address: {name}", partial(fetched, address), COMMANDS if name == "pipe:" else {})
        for name, address in ADDRESSES.items()
    ),
    *(Case(f"redirect {name}", partial(redirected, location)) for name, location in REDIRECTS.items()),
]
