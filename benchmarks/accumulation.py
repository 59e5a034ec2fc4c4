"""A batch in pieces: ours (`trainer.micro_batch_size`) and open_clip's `--accum-freq`, against the whole batch.

    python -m benchmarks.accumulation [--rounds 5] [--threads 2] [--pieces 4] [--micro 16] [--json]

Gradients are compared in float64 on a small CLIP and a small CoCa with the same weights on both sides: ours must equal
those of the whole batch to 1e-10. Then whole accumulated steps are timed on ViT-S/32 under bfloat16 autocast, with
equal pieces. open_clip's side is its own trainer's code (`open_clip_train.train.train_one_epoch`).
"""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from open_clip.loss import ClipLoss, CoCaLoss
from open_clip_train.train import train_one_epoch
from torch import Tensor, nn

from benchmarks import _harness as harness
from benchmarks import _models, _open_clip
from benchmarks.train_step import Inputs, Setting, made
from mmpretrain.losses import ContrastiveLoss, PredictionLoss
from mmpretrain.training.cpu import use_plain_attention
from mmpretrain.training.micro_batches import forward_in_micro_batches
from mmpretrain.types import Batch, Outputs, Padded

EXACT = 1e-10
EPSILON = torch.finfo(torch.float64).eps
Gradients = dict[str, Tensor]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--pieces", type=int, default=4, help="micro-batches of one step")
    parser.add_argument("--micro", type=int, default=16, help="samples of a micro-batch, where speed is measured")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    checked: dict[str, float] = {}
    rows, notes = [], []
    for name in ("tiny", "tiny_coca"):
        found, said = exactness(name, given.pieces, checked)
        rows += found
        notes += said
    rows.append(speed("ViT-S-32", given.pieces, given.micro, given.rounds))
    settings = {"pieces": given.pieces, "micro-batch": given.micro, "precision": "float64, then bf16 autocast"}
    packages = ["torch", "open_clip_torch"]
    harness.finish(harness.Report("accumulation", rows, checked, packages, settings, notes), given.json)


def exactness(name: str, pieces: int, checked: dict[str, float]) -> tuple[list[harness.Row], list[str]]:
    """Compare the gradients of accumulated steps of both sides with those of the whole batch, in float64."""
    pair = _models.pair(name, dtype=torch.float64)
    inputs = small(pair, 3 * pieces)
    whole = gradients(pair.ours, lambda: _models.our_loss(pair.ours, inputs.ours))
    theirs = gradients(pair.peer, lambda: _models.peer_loss(pair.peer, inputs.images, inputs.ids))
    rules = _models.rules(_models.configuration(name))
    checked |= harness.check(
        {f"{name}, both sides, whole batch": (difference(_open_clip.converted(theirs, rules), whole), EXACT)}
    )
    ours = gradients(pair.ours, lambda: our_loss(pair.ours, inputs.ours, 3))
    peer_step(pair.peer, inputs, pieces, torch.optim.SGD(pair.peer.parameters(), lr=0.0), "fp32")
    peer = _open_clip.converted({n: p.grad for n, p in pair.peer.named_parameters() if p.grad is not None}, rules)
    checked |= harness.check({f"{name}, ours in pieces": (difference(ours, whole), EXACT)})
    scalars = {"logit_scale"}
    kinds = {"weights": set(whole) - scalars, "logit_scale": scalars}
    rows = []
    for kind, names in kinds.items():
        errors = [max(EPSILON, difference(side, whole, names)) for side in (ours, peer)]
        title = f"{name}, error of the gradient: {kind}"
        rows.append(harness.Row(title, "of its size", [errors[0]], [errors[1]], "open_clip --accum-freq", False))
    ratio = (peer["logit_scale"] / whole["logit_scale"]).item()
    return rows, [f"{name}: open_clip's logit_scale gradient is {ratio:.4f} times that of the whole batch."]


def speed(name: str, pieces: int, micro: int, rounds: int) -> harness.Row:
    """Measure whole accumulated steps of both sides in turn."""
    pair = _models.pair(name)
    use_plain_attention(pair.ours)
    inputs = made(pair, Setting(name, "web", pieces * micro, 1.0))
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for model in (pair.ours, pair.peer)]

    def ours() -> float:
        start = time.perf_counter()
        optimizers[0].zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = our_loss(pair.ours, inputs.ours, micro)
        loss.backward()
        optimizers[0].step()
        return pieces * micro / (time.perf_counter() - start)

    def peer() -> float:
        start = time.perf_counter()
        peer_step(pair.peer, inputs, pieces, optimizers[1], "amp_bf16")
        return pieces * micro / (time.perf_counter() - start)

    found = harness.alternate({"ours": ours, "peer": peer}, rounds)
    title = f"{name}, batch {pieces * micro} in pieces of {micro}"
    return harness.Row(title, "samples/s", found["ours"], found["peer"], "open_clip --accum-freq", target=1.0)


def our_loss(model: nn.Module, batch: Batch, micro: int) -> Tensor:
    """Compute the loss of the whole batch from pieces of `micro` rows."""
    outputs: Outputs = forward_in_micro_batches(model, batch, micro)  # type: ignore[arg-type]
    loss: Tensor = _models.CONTRASTIVE_WEIGHT * ContrastiveLoss()(outputs)
    return loss + _models.CAPTION_WEIGHT * PredictionLoss("caption")(outputs) if outputs.predictions else loss


def peer_step(model: nn.Module, inputs: Inputs, pieces: int, optimizer: torch.optim.Optimizer, precision: str) -> None:
    """Run one accumulated step of open_clip's own trainer."""
    loss: Any = ClipLoss()
    if hasattr(model, "text_decoder"):
        loss = CoCaLoss(caption_loss_weight=_models.CAPTION_WEIGHT, clip_loss_weight=_models.CONTRASTIVE_WEIGHT)
    batches = list(zip(inputs.images.chunk(pieces), inputs.ids.chunk(pieces), strict=True))
    arguments = Namespace(
        device="cpu",
        precision=precision,
        accum_freq=pieces,
        distill=False,
        skip_scheduler=True,
        grad_clip_norm=None,
        horovod=False,
        rank=0,
        local_rank=0,
        world_size=1,
        batch_size=len(batches[0][0]),
        log_every_n_steps=1000,
        log_local=False,
        wandb=False,
    )
    logging.getLogger().setLevel(logging.WARNING)
    data = {"train": Data(batches)}
    train_one_epoch(model, data, loss, 0, optimizer, None, None, None, arguments)


class Data:
    """What open_clip's trainer asks of its data, around batches that are ready."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.num_batches, self.num_samples = len(batches), sum(len(images) for images, _ in batches)
        self.dataloader = self

    def __iter__(self) -> Any:
        return iter(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """Nothing to shuffle."""


def small(pair: _models.Pair, size: int) -> Inputs:
    """Draw a batch for a small model, in float64, with texts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, pair.image_size, pair.image_size, generator=generator, dtype=torch.float64)
    lengths = torch.randint(3, pair.context_length + 1, (size,), generator=generator)
    ids = torch.randint(1, pair.eos_id - 1, (size, pair.context_length), generator=generator)
    position = torch.arange(pair.context_length)
    ids[position == lengths[:, None] - 1] = pair.eos_id
    mask = position < lengths[:, None]
    ids = ids.masked_fill(~mask, pair.pad_id)
    return Inputs({"image": Padded(images), "text": Padded(ids, mask)}, images, ids)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> Gradients:
    """Compute every gradient of a loss, by name."""
    model.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found: Gradients, wanted: Gradients, names: set[str] | None = None) -> float:
    """Norm of the difference over the norm of what is wanted, over the tensors of `names`."""
    names = set(wanted) if names is None else names
    missing = [name for name in sorted(names) if name not in found]
    if missing:
        raise SystemExit(f"no gradient of {', '.join(missing)}")
    wrong = torch.stack([(found[name] - wanted[name]).norm() for name in names]).norm()
    return (wrong / torch.stack([wanted[name].norm() for name in names]).norm()).item()


if __name__ == "__main__":
    main()
