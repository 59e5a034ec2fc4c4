"""Text encoder forward and backward, real captions: only their tokens, against 77 positions for each.

    python -m benchmarks.text_padding [--rounds 5] [--threads 2] [--json] [--batch-size 32]

The text tower of ViT-B/32 (width 512, depth 12, 8 heads), the same weights on both sides. The peer is open_clip with
its standard tokenizer, which always pads to 77 positions. Captions are those of `benchmarks/_captions.py`: names of
OpenMoji's pictures, and lengths like those of web captions with 16 ids on average. Tokenizing is not measured. First
embeddings and the gradients of all weights are compared.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _captions, _harness, _models, _open_clip
from mmpretrain.data.tokenizer import ClipTokenizer
from mmpretrain.training.cpu import use_plain_attention
from mmpretrain.types import Padded

PRECISIONS = {"float32": (torch.float32, 1e-3), "bfloat16": (torch.bfloat16, 0.05)}
"""Name -> type of autocast, and how far both sides may differ, relative to the length of what is compared."""


def work(
    model: nn.Module, embed: Callable[[], Tensor], direction: Tensor, precision: torch.dtype
) -> Callable[[], Tensor]:
    """Make one forward and backward pass through a text tower; it returns the embeddings."""

    def run() -> Tensor:
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            embedded = embed().float()
        torch.autograd.backward((embedded * direction).sum())
        return embedded.detach()

    return run


def gradients(pair: _models.Pair) -> tuple[Tensor, Tensor]:
    """Gradients of both towers, as long vectors in the same order."""
    config = _models.configuration(pair.name)
    theirs = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in pair.peer.state_dict().items()}
    theirs.update({name: p.grad for name, p in pair.peer.named_parameters() if p.grad is not None})
    converted = _open_clip.converted(theirs, _models.rules(config))
    ours = {name: p.grad for name, p in pair.ours.named_parameters() if p.grad is not None}
    return torch.cat([g.flatten() for g in ours.values()]), torch.cat([converted[name].flatten() for name in ours])


def apart(got: Tensor, want: Tensor) -> float:
    """Distance relative to the length of what is wanted."""
    return float((got - want).norm() / want.norm())


def main() -> None:
    parser = _harness.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--kinds", nargs="+", choices=_captions.KINDS, default=_captions.KINDS)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--model", default="ViT-B-32", help="a configuration of open_clip")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pair = _models.pair(arguments.model)
    use_plain_attention(pair.ours)  # as our trainer does on a CPU
    rows, checked, tokens = [], {}, {}
    for kind in arguments.kinds:
        text, ids = batch(pair, kind, arguments.batch_size)
        assert text.lengths is not None
        tokens[kind] = text.lengths
        direction = torch.randn(arguments.batch_size, pair.ours.embed_dim, generator=torch.Generator().manual_seed(0))
        for name in arguments.precisions:
            precision, allowed = PRECISIONS[name]
            _harness.note(f"{kind}, {name}")
            ours = work(pair.ours, lambda text=text: pair.ours.embed("text", text), direction, precision)  # type: ignore[misc]
            peer = work(pair.peer, lambda ids=ids: encode(pair.peer, ids), direction, precision)  # type: ignore[misc]
            embeddings = apart(ours(), peer())
            found = {"embeddings": embeddings, "gradients": apart(*gradients(pair))}
            checked.update(_harness.check({f"{w} ({kind}, {name})": (d, allowed) for w, d in found.items()}))
            sides = {"ours": ours, "peer": peer}
            times = _harness.alternate(
                {side: lambda run=run: _harness.seconds(run) for side, run in sides.items()},  # type: ignore[misc]
                arguments.rounds,
            )
            speed = {side: [arguments.batch_size / t for t in values] for side, values in times.items()}
            rows.append(
                _harness.Row(f"{kind} captions, {name}", "texts/s", speed["ours"], speed["peer"], "open_clip", target=3)
            )
    means = ", ".join(f"{kind} {found.total / len(found):.1f} ({found.longest})" for kind, found in tokens.items())
    shown = {"model": arguments.model, "batch size": arguments.batch_size, "ids of a caption: mean (longest)": means}
    _harness.finish(_harness.Report("text_padding", rows, checked, ["torch", "open_clip_torch"], shown), arguments.json)


def batch(pair: _models.Pair, kind: str, size: int) -> tuple[Padded, Tensor]:
    """Captions of a kind, as our tokenizer gives them, and padded to the context length."""
    texts = _captions.captions(kind, size)
    random.Random(0).shuffle(texts)
    text = ClipTokenizer(pair.context_length)(texts)
    return text, ClipTokenizer(pair.context_length, "context_length")(texts).values


def encode(model: Any, ids: Tensor) -> Tensor:
    """Embed texts with open_clip."""
    embedded: Tensor = model.encode_text(ids, normalize=True)
    return embedded


if __name__ == "__main__":
    main()
