"""Features of data sets, embedded once for all evaluators that ask for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from torch.utils.data import Dataset

from mmpretrain.errors import InputError
from mmpretrain.evaluation.embed import Embedded, device_of, embed_images

if TYPE_CHECKING:
    from mmpretrain.model import MultimodalModel

Features = Literal["embedding", "pooled"]
"""What stands for a picture: its unit vector in the shared space (N,E), or the encoder's output before the projection
(N,D), of any length."""


class _Kept(NamedTuple):
    """Features on the CPU, and the objects whose ids are in the key: while they live no other has these ids."""

    embedded: Embedded
    owners: tuple[object, ...]


_SHARED: ContextVar[dict[tuple[Any, ...], _Kept] | None] = ContextVar("shared_features", default=None)


@contextmanager
def shared_features() -> Iterator[None]:
    """Inside, `image_features` embeds a data set once for each model and transform; within another it shares that one.

    Which data sets are the same is told by their attribute `identity`, a hashable value that `BenchmarkData` has; one
    without it is embedded each time. Features wait on the CPU, N x E floats for each data set, and are forgotten at
    the end. Weights must not change inside.
    """
    if _SHARED.get() is not None:
        yield
        return
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def image_features(
    model: MultimodalModel,
    data: Dataset[Any],
    batch_size: int = 256,
    num_workers: int = 0,
    features: Features = "embedding",
) -> Embedded:
    """Embed every picture of `data` as `embed_images` does, or return what `shared_features` holds of it already."""
    check_features(features)
    kept, identity, transform = _SHARED.get(), getattr(data, "identity", None), getattr(data, "transform", None)
    projected = features == "embedding"
    if kept is None or identity is None:
        return embed_images(model, data, batch_size, num_workers, projected)
    key = (id(model), id(transform), identity, features)
    if key not in kept:
        found = embed_images(model, data, batch_size, num_workers, projected)
        kept[key] = _Kept(Embedded(found.embeddings.cpu(), found.targets), (model, transform))
    embeddings, targets = kept[key].embedded
    return Embedded(embeddings.to(device_of(model)), targets)


def check_features(features: str) -> None:
    """Raise `InputError` unless `features` is one of the kinds there are."""
    if features not in get_args(Features):
        raise InputError(f"features={features!r}; expected one of {', '.join(get_args(Features))}")
