"""The text encoder: pooling, masks, causality, initialisation, step-by-step encoding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpretrain import InputError, TextEncoder
from tests.models import EOS, PAD, START, VOCAB


def encoder(seed: int = 0, **options) -> TextEncoder:
    torch.manual_seed(seed)
    return TextEncoder(VOCAB, 10, 32, 2, 2, EOS, **options).double().eval()


def text(length: int, pad_to: int | None = None, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, START, (1, length), generator=torch.Generator().manual_seed(seed))
    ids[0, 0], ids[0, -1] = START, EOS
    padded = torch.full((1, pad_to or length), PAD)
    padded[:, :length] = ids
    return padded, torch.arange(padded.shape[1])[None] < length


EXACT_UNDER_PADDING = [
    {},
    {"pooling": "class_token"},
    {"pooling": "mean"},
    {"causal": False},
    {"causal": False, "pooling": "mean"},
    {"causal": False, "pooling": "class_token"},
]


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(EXACT_UNDER_PADDING), st.integers(3, 9), st.integers(0, 50))
def test_padding_changes_nothing_wherever_we_trim_it(options, length, seed):
    model = encoder(**options)
    short = model(*text(length, seed=seed))
    long = model(*text(length, 10, seed))
    torch.testing.assert_close(long.pooled, short.pooled, rtol=0, atol=1e-12)
    torch.testing.assert_close(long.tokens[:, :length], short.tokens, rtol=0, atol=1e-12)


def test_last_pooling_sees_padding_which_is_why_its_text_is_never_trimmed():
    model = encoder(causal=False, pooling="last")
    ids, _ = text(5, 10)
    other = ids.clone()
    other[:, 7] = 3
    assert (model(ids).pooled - model(other).pooled).abs().max() > 1e-3
    with pytest.raises(InputError, match="pad=context_length"):
        model(ids[:, :5])
    torch.testing.assert_close(model(ids).pooled, model(ids).tokens[:, -1])


@pytest.mark.parametrize("pooling", ["eos", "class_token"])
def test_causal_tokens_do_not_see_later_ones(pooling):
    model = encoder(pooling=pooling)
    ids, mask = text(8)
    other = ids.clone()
    other[0, 5] = ids[0, 5] % 40 + 1
    before, after = model(ids, mask).tokens, model(other, mask).tokens
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=0)
    assert (after[:, 5:] - before[:, 5:]).abs().max() > 1e-6


def test_bidirectional_tokens_do_see_later_ones():
    model = encoder(causal=False)
    ids, mask = text(8)
    other = ids.clone()
    other[0, 5] = ids[0, 5] % 40 + 1
    assert (model(other, mask).tokens[:, :5] - model(ids, mask).tokens[:, :5]).abs().max() > 1e-6


@pytest.mark.parametrize("causal", [True, False])
def test_nothing_sees_the_class_token(causal):
    model = encoder(pooling="class_token", causal=causal)
    ids, mask = text(6, 8)
    before = model(ids, mask)
    with torch.no_grad():
        model.class_token += torch.randn(32)
    after = model(ids, mask)
    torch.testing.assert_close(after.tokens[mask], before.tokens[mask], rtol=0, atol=0)
    assert (after.pooled - before.pooled).abs().max() > 1e-4


@pytest.mark.parametrize(("class_mask", "moves"), [("exact", False), ("legacy", True)])
def test_the_class_token_sees_the_first_padding_only_under_the_legacy_mask(class_mask, moves):
    model = encoder(pooling="class_token", class_mask=class_mask)
    ids, mask = text(6, 10)
    before = model(ids, mask).pooled
    with torch.no_grad():
        model.token_embedding.weight[PAD] += torch.randn(32)
    assert bool((model(ids, mask).pooled - before).abs().max() > 1e-4) is moves


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("real", [[3, 4, 5, 6, 7], [0, 1, 2, 5, 6], [0, 1, 2]])
def test_a_class_token_sees_what_the_mask_says_whatever_its_form(causal, real):
    model = encoder(pooling="class_token", causal=causal)
    ids, mask = text(8)[0], torch.zeros(1, 8, dtype=torch.bool)
    mask[:, real] = True
    want = model(ids, mask).pooled
    for place in range(8):
        other = ids.clone()
        other[0, place] = ids[0, place] % 40 + 1
        moved = (model(other, mask).pooled - want).abs().max()
        assert moved > 1e-6 if place in real else moved < 1e-12


def test_eos_pooling_takes_the_first_end_and_needs_no_mask():
    model = encoder()
    ids, mask = text(5, 10)
    encoded = model(ids)
    torch.testing.assert_close(encoded.pooled, encoded.tokens[:, 4])
    torch.testing.assert_close(model(ids, mask).pooled, encoded.pooled)
    sticky = ids.clone()
    sticky[:, 5:] = EOS
    torch.testing.assert_close(model(sticky).pooled, encoded.pooled)


@pytest.mark.parametrize("pooling", ["eos", "class_token"])
@pytest.mark.parametrize("chunks", [(1, 1, 1, 1, 1, 1), (3, 1, 2), (6,)])
def test_step_by_step_equals_one_pass(pooling, chunks):
    model = encoder(pooling=pooling)
    ids, _ = text(6)
    state, pieces, start = model.start(), [], 0
    for length in chunks:
        tokens, state = model.extend(ids[:, start : start + length], state)
        pieces.append(tokens)
        start += length
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).tokens, rtol=0, atol=1e-12)


def test_initialisation_is_clips():
    torch.manual_seed(0)
    width, depth = 256, 4
    model = TextEncoder(5000, 77, width, depth, 4, EOS)
    block = model.blocks[0]
    expected = {
        model.token_embedding.weight: 0.02,
        model.position_embedding: 0.01,
        block.attention.q.weight: width**-0.5,
        block.attention.k.weight: width**-0.5,
        block.attention.v.weight: width**-0.5,
        block.attention.o.weight: width**-0.5 * (2 * depth) ** -0.5,
        block.mlp.up.weight: (2 * width) ** -0.5,
        block.mlp.down.weight: width**-0.5 * (2 * depth) ** -0.5,
    }
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.03)
        assert abs(parameter.mean().item()) < std / 20


def test_plain_attention_equals_the_fused_one():
    for options in ({}, {"causal": False}, {"pooling": "class_token"}):
        model = encoder(**options)
        fused = model(*text(6, 9))
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        plain = model(*text(6, 9))
        torch.testing.assert_close(plain.pooled, fused.pooled, rtol=0, atol=1e-12)
        torch.testing.assert_close(plain.tokens, fused.tokens, rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = encoder(gradient_checkpointing=checkpointing).train()
        model(*text(6, 9)).pooled.square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=1e-12)


def test_wrong_input_says_what_to_change():
    with pytest.raises(InputError, match="context_length"):
        encoder()(torch.ones(1, 11, dtype=torch.long))
    with pytest.raises(InputError, match="choose one of"):
        encoder(pooling="first")
    with pytest.raises(InputError, match="eos_id 50"):
        TextEncoder(50, 10, 32, 2, 2, 50)
    with pytest.raises(InputError, match="num_heads"):
        TextEncoder(50, 10, 32, 2, 3, 49)
    with pytest.raises(InputError, match="quick_gelu"):
        encoder(activation="relu6")
    with pytest.raises(InputError, match="causal=true"):
        encoder(causal=False).start()


def test_an_encoder_that_reads_padding_attends_to_it_and_pools_at_the_end_of_text():
    model = encoder(causal=False, reads_padding=True)
    ids, mask = text(5, 10)
    with torch.no_grad():
        found = model(ids, mask)
        assert torch.equal(found.pooled, model(ids).pooled)  # the mask takes nothing away
        assert torch.equal(found.pooled[0], found.tokens[0, 4])
        model.token_embedding.weight[PAD, 0] += 1
        assert not torch.allclose(model(ids, mask).pooled, found.pooled)


def test_an_encoder_that_reads_padding_needs_it_and_has_no_class_token():
    with pytest.raises(InputError, match="reads padding as text"):
        encoder(causal=False, reads_padding=True)(*text(5, 8))
    with pytest.raises(InputError, match="class_mask=legacy"):
        encoder(pooling="class_token", reads_padding=True)
