"""Captions: cached equals uncached, greedy, top-p and beam search against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from mmpretrain import InputError, MultimodalModel, Padded
from mmpretrain.data.tokenizer import ByteTokenizer
from mmpretrain.generation import Decoder, beam_ids, beam_search, greedy, greedy_ids, top_p, top_p_ids
from tests import models

START, EOS, PAD = models.START, models.EOS, models.PAD


def sharp(seed: int = 0) -> MultimodalModel:
    """A CoCa whose next-token probabilities are far from uniform, so that choices are clear."""
    model = models.coca(seed).double().eval()
    with torch.no_grad():
        model.heads["caption"].weight *= 8
    return model


def pixels(count: int) -> torch.Tensor:
    return models.batch(count)["image"].values.double() / 255


def uncached_logits(model: MultimodalModel, images: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits after `ids` from one whole forward pass; a dummy last token makes position L-1 a predicting one."""
    text = torch.cat([ids, ids[:, :1]], 1)
    hidden, weight, _ = model({"image": Padded(images), "text": Padded(text)}).predictions["caption"]
    return F.linear(hidden[:, -1], weight)


@torch.no_grad()
def test_cached_logits_equal_uncached_ones_token_by_token():
    model, images = sharp(), pixels(3)
    ids = models.batch(3, lengths=[10, 10, 10])["text"].values
    decoder = Decoder(model, images)
    for length in range(1, 11):
        got = decoder.step(ids[:, length - 1 : length])
        torch.testing.assert_close(got.double(), uncached_logits(model, images, ids[:, :length]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_greedy_equals_the_uncached_loop():
    model, images = sharp(), pixels(4)
    ids = torch.full((4, 1), START)
    ended = torch.zeros(4, dtype=torch.bool)
    while ids.shape[1] < 11 and not ended.all():
        chosen = uncached_logits(model, images, ids).argmax(-1).masked_fill(ended, PAD)
        ids = torch.cat([ids, chosen[:, None]], 1)
        ended |= chosen == EOS
    assert greedy_ids(Decoder(model, images), START, EOS, PAD, 11).tolist() == ids.tolist()


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_wide_beams_find_the_best_text_of_all(penalty):
    model, images = sharp(3), pixels(2)
    keep = [EOS, 1, 2, 3]  # a vocabulary small enough to try every text of up to 4 ids
    blocked = torch.ones(models.VOCAB, dtype=torch.bool)
    blocked[keep] = False

    class Small(Decoder):
        def step(self, ids):
            return super().step(ids).masked_fill(blocked, -1e9)

    got = beam_ids(Small(model, images), START, EOS, PAD, 5, num_beams=300, length_penalty=penalty)
    for row in range(2):
        scored = {}
        for length in range(1, 5):
            for text in itertools.product(keep, repeat=length):
                if EOS in text[:-1] or (length < 4 and text[-1] != EOS):
                    continue
                ids, total = torch.tensor([[START, *text]]), 0.0
                for i in range(length):
                    logits = uncached_logits(model, images[row : row + 1], ids[:, : i + 1])
                    total += logits.masked_fill(blocked, -1e9).log_softmax(-1)[0, ids[0, i + 1]].item()
                scored[text] = total / length**penalty
        best = max(scored, key=scored.get)
        assert got[row, 1 : len(best) + 1].tolist() == list(best)


@torch.no_grad()
def test_one_beam_is_greedy_and_rows_do_not_mix():
    model, images = sharp(), pixels(3)
    greedy_rows = greedy_ids(Decoder(model, images), START, EOS, PAD, 9)
    one = beam_ids(Decoder(model, images), START, EOS, PAD, 9, num_beams=1)
    assert one[:, : greedy_rows.shape[1]].tolist() == greedy_rows[:, : one.shape[1]].tolist()
    together = beam_ids(Decoder(model, images), START, EOS, PAD, 9, num_beams=4)
    for row in range(3):
        alone = beam_ids(Decoder(model, images[row : row + 1]), START, EOS, PAD, 9, num_beams=4)[0].tolist()
        both = together[row].tolist()
        length = min(len(alone), len(both))
        assert both[:length] == alone[:length] and not any(both[length:]) and not any(alone[length:])


@torch.no_grad()
def test_more_beams_never_find_a_worse_text_here():
    model, images = sharp(1), pixels(4)

    def score(ids):
        total = []
        for row, image in zip(ids, images, strict=True):
            text = row[: (row == EOS).int().argmax() + 1] if (row == EOS).any() else row
            logs = [
                uncached_logits(model, image[None], text[None, :i]).log_softmax(-1)[0, text[i]]
                for i in range(1, len(text))
            ]
            total.append(sum(logs).item() / len(logs))
        return total

    narrow, wide = (beam_ids(Decoder(model, images), START, EOS, PAD, 8, num_beams=n) for n in (1, 12))
    assert all(w >= n - 1e-9 for n, w in zip(score(narrow), score(wide), strict=True))


@torch.no_grad()
def test_top_p_draws_by_probability_within_the_nucleus():
    model, images = sharp(), pixels(1).repeat(4000, 1, 1, 1)
    probability = uncached_logits(model, images[:1], torch.tensor([[START]])).softmax(-1)[0]
    order = probability.sort(descending=True)
    nucleus = order.indices[: int((order.values.cumsum(0) < 0.6).sum()) + 1]
    drawn = top_p_ids(Decoder(model, images), START, EOS, PAD, 2, 0.6, torch.Generator().manual_seed(0))[:, 1]
    assert set(drawn.tolist()) <= set(nucleus.tolist())
    want = probability[nucleus] / probability[nucleus].sum()
    got = torch.stack([(drawn == i).double().mean() for i in nucleus])
    torch.testing.assert_close(got, want, rtol=0, atol=0.04)
    tiny = top_p_ids(Decoder(model, images[:2]), START, EOS, PAD, 9, 1e-9, torch.Generator().manual_seed(0))
    assert tiny.tolist() == greedy_ids(Decoder(model, images[:2]), START, EOS, PAD, 9).tolist()


def test_texts_come_out_and_wrong_use_is_refused():
    tokenizer = ByteTokenizer(12)
    torch.manual_seed(0)
    from mmpretrain import CaptionHead, CrossAttentionFusion, TextEncoder

    text = TextEncoder(tokenizer.vocab_size, 12, 32, 1, 2, tokenizer.eos_id, pooling="class_token")
    parts = {"image": models.coca().encoders["image"], "text": text}
    model = MultimodalModel(
        16, parts, CrossAttentionFusion(32, 1, 2), {"caption": CaptionHead(tokenizer.vocab_size, 32)}
    ).eval()
    images = models.batch(2)["image"].values
    for write in (greedy, top_p, beam_search):
        texts = write(model, images, tokenizer)
        assert len(texts) == 2 and all(isinstance(t, str) for t in texts)
        with pytest.raises(InputError, match="max_length is 99"):
            write(model, images, tokenizer, 99)
    with pytest.raises(InputError, match="load a CoCa model"):
        greedy(models.clip(), images, tokenizer)
    with pytest.raises(InputError, match="top_p is 0"):
        top_p(model, images, tokenizer, p=0.0)
