"""Embed a data set of any length, shared out over ranks and put back in data-set order.

An evaluation data set is any map-style data set whose items are `(image tensor, target)`. Rank r handles the
items r, r + world_size, …; every rank runs the same number of batches of the same size, because a model whose
weights are spread over ranks talks to the others in each forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from mmpretrain.distributed import gather_uneven, rank, world_size
from mmpretrain.errors import InputError
from mmpretrain.types import Padded, Tokenizer

if TYPE_CHECKING:
    from mmpretrain.model import MultimodalModel

Stack = Callable[[list[Tensor]], Any]
"""What makes a batch of pictures, a tensor or `Padded`."""
DataFactory = Callable[..., Dataset[Any]]
"""Called as `data(transform=preprocess)`: torchvision's data sets, a partial of one, or ours."""


class Embedded(NamedTuple):
    """A whole data set, on every rank: `embeddings` (N,E) float32, unit vectors if projected, `targets` of length N."""

    embeddings: Tensor
    targets: list[Any]


def embed_images(
    model: MultimodalModel,
    data: Dataset[Any],
    batch_size: int = 256,
    num_workers: int = 0,
    projected: bool = True,
) -> Embedded:
    """Embed every picture of `data`, whose items are `(image (3,H,W), target)`; JSON must hold the target.

    Not `projected`: the encoder's pooled output before the projection, (N,D) and of any length. The model runs in
    evaluation mode without gradients, under the autocast context of the caller. Raises `InputError` where the data
    set is empty, has no length, or gives something else than such pairs.
    """
    device, rows, targets = device_of(model), [], []
    with evaluating(model):
        for images, found in batches(data, batch_size, num_workers, stacking(model)):
            images = images.to(device)
            made = model.embed("image", images) if projected else model.encode("image", images).pooled
            rows.append(made.float())
            targets += found
    count = len_of(data)
    # Checked once gathered, so that every rank raises and none waits for the others.
    return Embedded(check_finite(in_order(torch.cat(rows), count)), gather_json(targets, count, device))


def embed_texts(model: MultimodalModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Embed texts, the same list on every rank, to (N,E) float32 of unit norm in their order."""
    check_batch_size(batch_size)
    if not texts:
        raise InputError("there is no text to embed; expected at least one caption or class name")
    device, mine, rows = device_of(model), share(len(texts)), []
    with evaluating(model):
        for start in range(0, len(mine), batch_size):
            tokens = tokenizer([texts[i] for i in mine[start : start + batch_size]])
            rows.append(model.embed("text", tokens.to(device)).float())
    return check_finite(in_order(torch.cat(rows), len(texts)))


def similarities(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of rows, (Q,E) and (M,E) to (Q,M), in true float32 whatever autocast and TF32 say."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(a.device.type, enabled=False):
            return a.float() @ b.float().T
    finally:
        torch.set_float32_matmul_precision(before)


def stacking(model: MultimodalModel) -> Stack:
    """How pictures become a batch: on canvases where the image encoder takes any size, else stacked."""
    from mmpretrain.data.naflex import on_canvas
    from mmpretrain.encoders.naflex import NaFlexImageEncoder

    encoder = model.encoders["image"]
    return partial(on_canvas, patch_size=encoder.patch_size) if isinstance(encoder, NaFlexImageEncoder) else torch.stack


def batches(
    data: Dataset[Any], batch_size: int, num_workers: int, stack: Stack = torch.stack
) -> Iterator[tuple[Any, list[Any]]]:
    """Yield this rank's share of `data` as images, (B,3,H,W) or what `stack` makes of them, and their B targets."""
    check_batch_size(batch_size)
    if not isinstance(num_workers, int) or num_workers < 0:
        raise InputError(f"num_workers is {num_workers!r}; expected a whole number from 0 up")
    return iter(
        DataLoader(
            Subset(data, share(len_of(data))),
            batch_size=batch_size,
            num_workers=num_workers,
            collate_fn=partial(_collate, stack=stack),
            # Without its own generator a loader draws from the global one: evaluation would alter training.
            generator=torch.Generator(),
        )
    )


def share(count: int) -> list[int]:
    """Indices that this rank handles, equally many on every rank: the last is repeated where they run out."""
    world = world_size()
    return [min(i, count - 1) for i in range(rank(), -(-count // world) * world, world)]


def in_order(mine: Tensor, count: int) -> Tensor:
    """Gather what every rank made of its `share`, rows (S,...), to (count,...) in data-set order."""
    gathered = gather_uneven(mine)
    return gathered.view(world_size(), -1, *mine.shape[1:]).transpose(0, 1).flatten(0, 1)[:count]


def check_finite(embeddings: Tensor) -> Tensor:
    """Return `embeddings`; raises `InputError` for NaN, with which every rank would look perfect."""
    if bad := int((~embeddings.isfinite()).any(dim=-1).sum()):
        raise InputError(
            f"{bad} of {len(embeddings)} embeddings hold NaN or infinity; look for a training that "
            "diverged, or for overflow in half precision"
        )
    return embeddings


def gather_json(mine: list[Any], count: int, device: torch.device) -> list[Any]:
    """Gather what every rank made of its `share`, values that JSON can hold, to `count` values in order."""
    try:
        payload = json.dumps(mine).encode()
    except TypeError as error:
        raise InputError(
            f"the data set's targets cannot be gathered: {error}; expected an int label or a list of captions"
        ) from error
    content = gather_uneven(torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device))
    sizes = gather_uneven(torch.tensor([len(payload)], device=device))
    parts = [json.loads(part.numpy().tobytes()) for part in torch.split(content.cpu(), sizes.tolist())]
    return [value for row in zip(*parts, strict=True) for value in row][:count]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module, frozen or not, has its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def device_of(model: nn.Module) -> torch.device:
    """Device of a model's parameters."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def len_of(data: Dataset[Any]) -> int:
    """Length of a data set; raises `InputError` where it is 0 or unknown."""
    try:
        count = len(data)  # type: ignore[arg-type]
    except TypeError as error:
        raise InputError(
            f"{type(data).__name__} has no length; expected a map-style data set with __len__ and __getitem__"
        ) from error
    if count == 0:
        raise InputError(f"the data set {type(data).__name__} is empty; check the path it reads")
    return count


def check_batch_size(batch_size: int) -> None:
    """Raise `InputError` unless `batch_size` is at least 1."""
    if not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; expected a whole number, at least 1")


def _collate(items: list[Any], stack: Stack) -> tuple[Tensor | Padded, list[Any]]:
    images: list[Tensor] = []
    targets: list[Any] = []
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2 or not isinstance(item[0], Tensor):
            given = [type(part).__name__ for part in item] if isinstance(item, tuple | list) else type(item).__name__
            raise InputError(
                f"an item of the data set is {given}; expected (image tensor, target). "
                "Pass `transform` on to the data set, and wrap a data set that gives other items"
            )
        images.append(item[0])
        # Labels that come as numpy or torch scalars become plain numbers.
        targets.append(item[1].item() if hasattr(item[1], "item") else item[1])
    if stack is torch.stack and len(shapes := {tuple(image.shape) for image in images}) > 1:
        raise InputError(f"pictures of different shapes {sorted(shapes)}; expected one, as `transform` makes them")
    return stack(images), targets
