"""Captions from images: greedy, top-p and beam search, one step at a time with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mmpretrain.encoders.text import TextEncoder
from mmpretrain.errors import InputError
from mmpretrain.fusion import CrossAttentionFusion
from mmpretrain.heads import CaptionHead
from mmpretrain.layers import KeyValueCache
from mmpretrain.model import MultimodalModel
from mmpretrain.types import Encoded, Padded, Tokenizer

Chooser = Callable[[Tensor], Tensor]
"""Logits (B,V) -> chosen ids (B,)."""


class Decoder:
    """A caption model in the middle of writing: feed it ids, get the logits of the next one.

    `values` are the raw inputs (images (B,C,H,W)) of the modality that the fusion reads. Raises `InputError` for a
    model without a caption head.
    """

    def __init__(self, model: MultimodalModel, values: Padded | Tensor, head: str = "caption") -> None:
        found = model.heads[head] if head in model.heads else None  # noqa: SIM401 (a ModuleDict has no get)
        if not isinstance(found, CaptionHead) or not isinstance(model.fusion, CrossAttentionFusion):
            raise InputError(f"this model writes no captions (its heads: {list(model.heads)}); load a CoCa model")
        encoder = model.encoders[found.modality]
        if not isinstance(encoder, TextEncoder):
            raise InputError(f"captions need mmpretrain.TextEncoder, not {type(encoder).__name__}")
        self.encoder, self.fusion, self.head = encoder, model.fusion, found
        self.context: Encoded = model.encode(self.fusion.context, values)
        self.text, self.state = encoder.start(), self.fusion.start()

    def step(self, ids: Tensor) -> Tensor:
        """Read further (B,n) ids and return the logits (B,V) of the id that follows them."""
        tokens, self.text = self.encoder.extend(ids, self.text)
        hidden = self.fusion.extend(tokens, self.context, self.state)
        return F.linear(hidden[:, -1], self.head.weight).float()

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (B',) of the batch, in that order."""
        caches: list[KeyValueCache] = [*self.text.caches, *self.state.caches]
        for cache in caches:
            cache.select(rows)
        pooled, tokens, mask, _ = self.context
        self.context = Encoded(pooled[rows], tokens[rows], None if mask is None else mask[rows])


@torch.no_grad()
def greedy_ids(decoder: Decoder, start_id: int, eos_id: int, pad_id: int, max_length: int) -> Tensor:
    """Take the likeliest id each time: (B,L) ids from `start_id` on, padded after `eos_id`."""
    return _write(decoder, start_id, eos_id, pad_id, max_length, lambda logits: logits.argmax(-1))


@torch.no_grad()
def top_p_ids(
    decoder: Decoder,
    start_id: int,
    eos_id: int,
    pad_id: int,
    max_length: int,
    top_p: float = 0.9,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw from the smallest set of ids whose probability reaches `top_p` (Holtzman et al. 2020): (B,L) ids."""
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}; give a probability above 0 and at most 1")

    def draw(logits: Tensor) -> Tensor:
        probability, order = logits.softmax(-1).sort(-1, descending=True)
        kept = probability.masked_fill(probability.cumsum(-1) - probability >= top_p, 0)
        return order.gather(1, torch.multinomial(kept, 1, generator=generator)).squeeze(1)

    return _write(decoder, start_id, eos_id, pad_id, max_length, draw)


@torch.no_grad()
def beam_ids(
    decoder: Decoder,
    start_id: int,
    eos_id: int,
    pad_id: int,
    max_length: int,
    num_beams: int = 6,
    length_penalty: float = 1.0,
) -> Tensor:
    """Keep the `num_beams` likeliest beginnings: the (B,L) ids with the best log-probability / length^penalty.

    Length counts the generated ids, the end included. Texts cut at `max_length` compete with finished ones.
    """
    batch, device = len(decoder.context.pooled), decoder.context.pooled.device
    ids = torch.full((batch, 1, 1), start_id, device=device)
    scores = torch.zeros(batch, 1, device=device)
    finished: list[list[tuple[float, Tensor]]] = [[] for _ in range(batch)]
    for length in range(1, max_length):
        logits = decoder.step(ids[:, :, -1:].flatten(0, 1))
        vocab = logits.shape[-1]
        totals = (scores[:, :, None] + logits.log_softmax(-1).view(*scores.shape, vocab)).flatten(1)
        # Twice as many candidates: at most one per beam ends, so num_beams that go on are always among them.
        best, index = totals.topk(min(2 * num_beams, totals.shape[1]), dim=1)
        beam, token = index // vocab, index % vocab
        for row in range(batch):
            for place in range(min(num_beams, best.shape[1])):
                if token[row, place] == eos_id and best[row, place] > -torch.inf:
                    text = torch.cat([ids[row, beam[row, place]], token[row, place].view(1)])
                    finished[row].append((float(best[row, place]) / length**length_penalty, text))
        best = best.masked_fill(token == eos_id, -torch.inf)
        scores, kept = best.topk(min(num_beams, best.shape[1]), dim=1)
        beam, token = beam.gather(1, kept), token.gather(1, kept)
        first = torch.arange(batch, device=device)[:, None] * ids.shape[1]
        decoder.select((first + beam).flatten())
        ids = torch.cat([ids.gather(1, beam[:, :, None].expand(-1, -1, ids.shape[2])), token[:, :, None]], dim=2)
        if all(
            _settled(row, best_running, length, max_length, length_penalty)
            for row, best_running in zip(finished, scores)
        ):
            break
    for row in range(batch):
        finished[row] += [(float(s) / (ids.shape[2] - 1) ** length_penalty, t) for s, t in zip(scores[row], ids[row])]
    winners = [max(row, key=lambda pair: pair[0])[1] for row in finished]
    return torch.nn.utils.rnn.pad_sequence(winners, batch_first=True, padding_value=pad_id)


def greedy(model: MultimodalModel, images: Tensor, tokenizer: Tokenizer, max_length: int | None = None) -> list[str]:
    """Write a caption for each image (B,C,H,W), taking the likeliest id each time."""
    decoder = Decoder(model, images)
    ids = greedy_ids(decoder, *_specials(tokenizer), _limit(decoder, max_length))
    return [tokenizer.decode(row) for row in ids.tolist()]


def top_p(
    model: MultimodalModel,
    images: Tensor,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    p: float = 0.9,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Write a caption for each image (B,C,H,W), drawn from the likeliest ids that hold probability `p`."""
    decoder = Decoder(model, images)
    ids = top_p_ids(decoder, *_specials(tokenizer), _limit(decoder, max_length), p, generator)
    return [tokenizer.decode(row) for row in ids.tolist()]


def beam_search(
    model: MultimodalModel,
    images: Tensor,
    tokenizer: Tokenizer,
    max_length: int | None = None,
    num_beams: int = 6,
    length_penalty: float = 1.0,
) -> list[str]:
    """Write a caption for each image (B,C,H,W) by beam search."""
    decoder = Decoder(model, images)
    ids = beam_ids(decoder, *_specials(tokenizer), _limit(decoder, max_length), num_beams, length_penalty)
    return [tokenizer.decode(row) for row in ids.tolist()]


def _write(decoder: Decoder, start_id: int, eos_id: int, pad_id: int, max_length: int, choose: Chooser) -> Tensor:
    rows, device = len(decoder.context.pooled), decoder.context.pooled.device
    ids = torch.full((rows, 1), start_id, device=device)
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    while ids.shape[1] < max_length and not ended.all():
        chosen = choose(decoder.step(ids[:, -1:]))
        ids = torch.cat([ids, chosen.masked_fill(ended, pad_id)[:, None]], dim=1)
        ended = ended | (chosen == eos_id)
    return ids


def _settled(
    finished: list[tuple[float, Tensor]], scores: Tensor, length: int, max_length: int, penalty: float
) -> bool:
    """Say whether no running text (log-probabilities (beams,)) can still beat the best finished one.

    Log-probabilities only fall while a text grows, so the best it can get is its present one over the kindest length.
    """
    kindest = (max_length - 1 if penalty > 0 else length) ** penalty
    return bool(finished) and max(score for score, _ in finished) >= float(scores.max()) / kindest


def _specials(tokenizer: Tokenizer) -> tuple[int, int, int]:
    start_id = getattr(tokenizer, "start_id", None)
    if start_id is None:
        raise InputError("writing captions needs a tokenizer with a start id; give one whose start_id is set")
    return int(start_id), tokenizer.eos_id, tokenizer.pad_id


def _limit(decoder: Decoder, max_length: int | None) -> int:
    longest = decoder.encoder.context_length
    if max_length is not None and not 2 <= max_length <= longest:
        raise InputError(f"max_length is {max_length}; give 2 to {longest}, the text encoder's context_length")
    return longest if max_length is None else max_length
