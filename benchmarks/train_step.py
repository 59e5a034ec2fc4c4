"""Whole training steps on a CPU (forward, loss, backward, fused AdamW) of ours and of open_clip, with the same weights.

    python -m benchmarks.train_step [--rounds 5] [--threads 2] [--rows clip_openmoji,clip_web,coca_web] [--json]
    python -m benchmarks.train_step --peer-compiled     # open_clip with its --torchcompile
    python -m benchmarks.train_step --attention         # ours with plain against ours with fused attention
    python -m benchmarks.train_step --profile           # where the time of one step goes, on both sides

Before anything is timed, loss and gradients of both sides are compared in float32 on a few samples. Steps are then
timed under bfloat16 autocast (`--precision amp_bf16` of open_clip). Pixels are ready in memory: ours takes them as
bytes and normalises them in the step, open_clip takes normalised floats, as its loader gives them. Both sides run in
one process, and so both with freed memory kept (`mmpretrain.training.cpu.keep_memory`), which open_clip does not do.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import _harness as harness
from benchmarks import _models, _open_clip
from benchmarks._captions import captions
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.encoders.image import CLIP_MEAN, CLIP_STD
from mmpretrain.training.cpu import cpu_precision, use_plain_attention
from mmpretrain.training.optim import parameter_groups
from mmpretrain.types import Batch, Padded

COMPARED = 4
"""Samples on which both sides are compared in float32."""


class Setting(NamedTuple):
    """One row of the table: a model, which captions, the batch, and the ratio it must reach."""

    model: str
    captions: str
    batch: int
    target: float


ROWS = {
    "clip_openmoji": Setting("ViT-B-32", "openmoji", 64, 1.35),
    "clip_web": Setting("ViT-B-32", "web", 64, 1.35),
    "coca_web": Setting("coca_ViT-B-32", "web", 16, 1.6),
}


class Inputs(NamedTuple):
    """The same samples for both sides."""

    ours: Batch
    images: Tensor
    ids: Tensor


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows, joined by commas")
    parser.add_argument("--batch", type=int, help="another batch size")
    parser.add_argument("--peer-compiled", action="store_true", help="compile open_clip's model (minutes)")
    parser.add_argument("--attention", action="store_true", help="compare plain with fused attention in ours")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, and stop")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows, checked = [], {}
    settings = {name: ROWS[name]._replace(batch=given.batch or ROWS[name].batch) for name in given.rows.split(",")}
    for model in dict.fromkeys(setting.model for setting in settings.values()):
        pair = _models.pair(model)
        use_plain_attention(pair.ours)
        if not given.profile:
            checked |= compared(pair)
        for setting in settings.values():
            if setting.model != model:
                continue
            if given.profile:
                profiled(pair, setting)
            elif given.attention:
                rows.append(attention_row(pair, setting, given.rounds))
            else:
                rows.append(row(pair, setting, given.rounds, given.peer_compiled, checked))
        del pair
        gc.collect()
    if given.profile:
        return
    harness.finish(
        harness.Report(
            "train_step (CPU)",
            rows,
            harness.check({what: (value, LIMITS[what.split(",")[0]]) for what, value in checked.items()}),
            ["torch", "open_clip_torch", "timm"],
            {"precision": "bf16 autocast", "optimizer": "fused AdamW", "rounds": given.rounds},
            [f"The trainer's own choice of precision on this CPU: {cpu_precision()}."],
        ),
        given.json,
    )


LIMITS = {"loss": 1e-5, "gradient": 1e-4, "gradient of a tensor": 1e-4, "bf16 loss": 0.02}
"""Largest relative differences allowed (of the losses under bfloat16: absolute)."""


def row(
    pair: _models.Pair, setting: Setting, rounds: int, peer_compiled: bool, checked: dict[str, float]
) -> harness.Row:
    """Measure ours and open_clip's in turn; the first losses under bfloat16 are compared, too."""
    inputs = made(pair, setting)
    peer_model: Any = torch.compile(pair.peer) if peer_compiled else pair.peer
    ours = stepper(pair.ours, lambda: _models.our_loss(pair.ours, inputs.ours))
    peer = stepper(pair.peer, lambda: _models.peer_loss(peer_model, inputs.images, inputs.ids))
    name = f"{setting.model}, batch {setting.batch}, captions {setting.captions}"
    harness.note(f"train_step: {name}")
    checked[f"bf16 loss, {name}"] = abs(ours() - peer())
    harness.check({what: (value, LIMITS[what.split(",")[0]]) for what, value in checked.items()})
    sides = {"ours": rate(ours, setting.batch), "peer": rate(peer, setting.batch)}
    found = harness.alternate(sides, rounds, warm_up=0)  # the comparison was the warm-up
    peer_name = "open_clip, compiled" if peer_compiled else "open_clip"
    return harness.Row(name, "samples/s", found["ours"], found["peer"], peer_name, target=setting.target)


def attention_row(pair: _models.Pair, setting: Setting, rounds: int) -> harness.Row:
    """Measure plain against fused attention, both ours."""
    inputs, fused = made(pair, setting), copy.deepcopy(pair.ours)
    for part in fused.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = True
    sides = {
        side: rate(stepper(model, lambda model=model: _models.our_loss(model, inputs.ours)), setting.batch)
        for side, model in (("plain", pair.ours), ("fused", fused))
    }
    found = harness.alternate(sides, rounds)
    name = f"{setting.model}, batch {setting.batch}, captions {setting.captions}: plain attention"
    return harness.Row(name, "samples/s", found["plain"], found["fused"], "ours with fused attention")


def stepper(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], float]:
    """Make a function that takes one optimizer step and returns the loss."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.2), lr=1e-6, betas=(0.9, 0.98), eps=1e-6, fused=True)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        return value.item()

    return step


def rate(step: Callable[[], float], batch: int) -> Callable[[], float]:
    """Samples a second of one step."""

    def measured() -> float:
        start = time.perf_counter()
        step()
        return batch / (time.perf_counter() - start)

    return measured


def made(pair: _models.Pair, setting: Setting) -> Inputs:
    """Draw pixels and captions."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (setting.batch, 3, pair.image_size, pair.image_size), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    texts = captions(setting.captions, setting.batch)
    tokens = ClipTokenizer(pair.context_length)(texts)
    ids = ClipTokenizer(pair.context_length, pad="context_length")(texts).values
    return Inputs({"image": Padded(pixels), "text": tokens}, (pixels / 255 - mean) / std, ids)


def compared(pair: _models.Pair) -> dict[str, float]:
    """Compare loss and gradients of both sides in float32: relative differences."""
    inputs = made(pair, Setting(pair.name, "web", COMPARED, 0))
    ours, peer = _models.our_loss(pair.ours, inputs.ours), _models.peer_loss(pair.peer, inputs.images, inputs.ids)
    ours.backward()
    peer.backward()
    found = {name: p.grad for name, p in pair.ours.named_parameters() if p.grad is not None}
    theirs = {name: p.grad for name, p in pair.peer.named_parameters() if p.grad is not None}
    expected = _open_clip.converted(theirs, _models.rules(_models.configuration(pair.name)))
    if found.keys() != expected.keys():
        raise SystemExit(f"gradients of one side only: {sorted(found.keys() ^ expected.keys())}")
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    wrong = {name: (found[name] - gradient).norm() for name, gradient in expected.items()}
    # A tensor whose gradient is nothing but rounding (biases of keys) is measured against the whole gradient.
    worst = max(wrong[name] / expected[name].norm().clamp(min=1e-3 * whole) for name in wrong)
    pair.ours.zero_grad()
    pair.peer.zero_grad()
    result = {
        f"loss, {pair.name}": abs(ours.item() / peer.item() - 1),
        f"gradient, {pair.name}": (torch.stack([*wrong.values()]).norm() / whole).item(),
        f"gradient of a tensor, {pair.name}": worst.item(),
    }
    return harness.check({what: (value, LIMITS[what.split(",")[0]]) for what, value in result.items()})


def profiled(pair: _models.Pair, setting: Setting) -> None:
    """Print the costliest operations of one step, for both sides."""
    inputs = made(pair, setting)
    losses = {
        harness.OURS: (pair.ours, lambda: _models.our_loss(pair.ours, inputs.ours)),
        "open_clip": (pair.peer, lambda: _models.peer_loss(pair.peer, inputs.images, inputs.ids)),
    }
    for side, (model, loss) in losses.items():
        step = stepper(model, loss)
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        found = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in found)
        print(f"\n{side}, {setting.model}, batch {setting.batch}, captions {setting.captions}: {total / 1e6:.2f} s\n")
        print("| operation | calls | s | share |\n| --- | --- | --- | --- |")
        for event in found[:14]:
            spent = event.self_cpu_time_total
            print(f"| {event.key[:48]} | {event.count} | {spent / 1e6:.3f} | {100 * spent / total:.1f} % |")


if __name__ == "__main__":
    main()
