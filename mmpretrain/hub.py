"""Model folders on the Hugging Face hub: pushed with a model card, downloaded without anything but tensors and text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmpretrain.errors import InputError
from mmpretrain.pretrained import CONFIG, WEIGHTS, load, model_folder

if TYPE_CHECKING:
    from collections.abc import Sequence

README, TRAINING = "README.md", "training.json"
FILES = (CONFIG, WEIGHTS, "tokenizer.json", "identity.json", "golden.safetensors")
"""What a model folder holds; nothing else of it is pushed or downloaded."""
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def push(
    folder: str | Path,
    repository: str,
    licence: str | None = None,
    private: bool = False,
    message: str = "Upload a model with mmpretrain",
    allow: Sequence[str] = (),
) -> str:
    """Push a model folder (or the run folder that holds one) to `org/name`, and return the address of the commit.

    The repository is made if it is not there. Beside the model go a model card with the metrics, the licence (an
    identifier of the hub's such as `apache-2.0`) and how to load it, and of a run what it was trained on and how.
    Files that a model pushed before left there and this one does not have are removed. The folder is verified first;
    raises `InputError` where it is not what its identity card says, has none, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from mmpretrain.hub_card import model_card, training

    check_names(repository, licence)
    source = model_folder(Path(folder))
    if not (source / "identity.json").is_file():
        raise InputError(f"{source} has no identity card; write one with `mmpretrain card {source}`, then push")
    load(source, allow=allow)
    made: dict[str, Path | bytes] = {name: source / name for name in FILES if (source / name).is_file()}
    trained = training(source)
    if trained is not None:
        made[TRAINING] = trained
    made[README] = model_card(source, repository, licence).encode()
    api = HfApi(library_name="mmpretrain")

    def request() -> str:
        api.create_repo(repository, private=private or None, exist_ok=True)
        there = api.list_repo_files(repository)
        stale = [name for name in (*FILES, TRAINING) if name in there and name not in made]
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in made.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)

    try:
        return request()
    except Exception as error:  # the hub's own errors, its HTTP client's and the system's have no base in common
        said = " ".join(str(error).split())[:300]
        raise InputError(f"cannot push to hf-hub:{repository}: {type(error).__name__}: {said}") from error


def download(repository: str, revision: str | None = None) -> Path:
    """Download a model folder of ours from `org/name` into the hub's own cache, and return where it lies.

    Only the files of a model folder and its model card are fetched, never a pickle. Without a connection, what was
    fetched before is returned. Raises `InputError` for a repository that is not there or holds no model folder.
    """
    from mmpretrain.interop.fetch import hub_folder

    check_names(repository, None)
    found = hub_folder(repository, revision, [*FILES, README, TRAINING])
    if not ((found / CONFIG).is_file() and (found / WEIGHTS).is_file()):
        raise InputError(f"hf-hub:{repository} holds no model folder of mmpretrain (no {CONFIG} with {WEIGHTS})")
    return found


def check_names(repository: str, licence: str | None) -> None:
    """Raise `InputError` unless `repository` is org/name and `licence` an identifier, or None."""
    if not REPOSITORY.fullmatch(repository):
        raise InputError(f"{repository!r} names no repository; expected org/name")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise InputError(f"licence={licence!r}; expected an identifier of the hub's, such as apache-2.0 or cc-by-4.0")
