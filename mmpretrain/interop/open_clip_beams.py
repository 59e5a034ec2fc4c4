"""Captions to the id as open_clip's `CoCa.generate` writes them, for comparing with what others have published.

For captions by the rules use `mmpretrain.generation`: open_clip adds raw logits where a beam search adds
log-probabilities, counts the start id as part of a text's length, and lets no text end before its fifth id.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmpretrain.errors import InputError
from mmpretrain.generation import Decoder


class _Finished:
    """The best few finished texts of one picture: (sum of logits / length, ids without the end)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.texts: list[tuple[float, Tensor]] = []
        self.done = False

    def add(self, total: float, length: int, ids: Tensor) -> None:
        """Keep a text while there is room for it, or in place of the worst."""
        self.texts = sorted([*self.texts, (total / length, ids)], key=lambda text: -text[0])[: self.most]

    def settle(self, best: float, length: int) -> None:
        """Stop where there are enough texts, and the best that goes on is no better than the worst of them."""
        self.done = self.done or (len(self.texts) == self.most and self.texts[-1][0] >= best / length)


@torch.no_grad()
def beam_ids(
    decoder: Decoder,
    start_id: int,
    eos_id: int,
    pad_id: int = 0,
    max_length: int = 30,
    num_beams: int = 6,
    num_groups: int = 3,
    min_length: int = 5,
) -> Tensor:
    """Return the (B,L) ids that `CoCa.generate(image)` gives for the pictures of `decoder`.

    Its groups of beams do not know of each other and so write the same: one of them is run here.
    """
    if num_beams % num_groups:
        raise InputError(f"num_beams={num_beams} is not a multiple of num_groups={num_groups}; change one of them")
    beams, batch = num_beams // num_groups, len(decoder.context.pooled)
    device = decoder.context.pooled.device
    first = torch.arange(batch, device=device)[:, None] * beams
    decoder.select(torch.arange(batch, device=device).repeat_interleave(beams))
    ids = torch.full((batch * beams, 1), start_id, device=device)
    scores = torch.full((batch, beams), -1e9, device=device)
    scores[:, 0] = 0
    finished = [_Finished(beams) for _ in range(batch)]
    while ids.shape[1] < max_length and not all(texts.done for texts in finished):
        logits = decoder.step(ids[:, -1:])
        if ids.shape[1] < min_length:
            logits[:, eos_id] = -torch.inf
        vocab = logits.shape[-1]
        best, index = (logits.view(batch, beams, vocab) + scores[:, :, None]).flatten(1).topk(2 * beams, dim=1)
        beam, token = index // vocab, index % vocab
        length = ids.shape[1] + 1
        for row, texts in enumerate(finished):
            if texts.done:
                continue
            for place in range(beams):
                if token[row, place] == eos_id:
                    texts.add(float(best[row, place]), length, ids[row * beams + beam[row, place]])
            texts.settle(float(best[row, 0]), length)
        # Of twice as many candidates at least `beams` go on; they stay in their order.
        going = best.masked_fill(token == eos_id, -torch.inf)
        scores, kept = going.topk(beams, dim=1)
        beam, token = beam.gather(1, kept), token.gather(1, kept)
        chosen = (first + beam).flatten()
        decoder.select(chosen)
        ids = torch.cat([ids[chosen], token.view(-1, 1)], dim=1)
    for row, texts in enumerate(finished):
        if not texts.done:
            for place in range(beams):
                texts.add(float(scores[row, place]), ids.shape[1], ids[row * beams + place])
    winners = [texts.texts[0][1] for texts in finished]
    width = min(max(len(text) for text in winners) + 1, max_length)
    written = torch.full((batch, width), pad_id, device=device)
    for row, text in enumerate(winners):
        written[row, : len(text)] = text
        if len(text) < width:
            written[row, len(text)] = eos_id
    return written
