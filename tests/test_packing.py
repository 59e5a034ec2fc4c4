"""Packed rows: the places, and no number that depends on padding, in any encoder, fusion or head."""

from __future__ import annotations

import functools
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpretrain import CaptionHead, ContrastiveLoss, InputError, MultimodalModel, Padded, PredictionLoss, TextEncoder
from mmpretrain.activation_checkpointing import checkpoint_activations
from mmpretrain.data.step import Collate, Drawn
from mmpretrain.data.tokenizer import ByteTokenizer
from mmpretrain.layers import Attention
from mmpretrain.packing import has_kernel, known_lengths, pack_places, pack_rows, varlen_attn
from mmpretrain.training.micro_batches import forward_in_micro_batches
from mmpretrain.types import Lengths
from tests import models
from tests.models import EOS, VOCAB

REAL = st.lists(st.integers(1, 12), min_size=1, max_size=7)
LENGTHS = REAL | st.lists(st.integers(0, 12), min_size=1, max_size=7)


def mean(seed: int = 0) -> MultimodalModel:
    model = models.clip(seed)
    model.encoders["text"] = TextEncoder(VOCAB, 12, 32, 2, 2, EOS, causal=False, pooling="mean")
    return model


EMPTY = [[12] + [0] * 7, [3] + [0] * 40, [5, 0, 3], [12, 12, 0, 1]]
FAMILIES = {"clip": models.clip, "mean": mean, "coca": models.coca}


def mask_of(lengths: list[int], length: int) -> torch.Tensor:
    return torch.arange(length) < torch.tensor(lengths)[:, None]


def batch(lengths: list[int], known: bool, dtype: torch.dtype = torch.float64) -> dict[str, Padded]:
    """Pictures and texts padded to 12; without a mask that shows a prefix, nothing can be packed."""
    found = models.batch(len(lengths), lengths=[max(n, 3) for n in lengths], pad_to=12)
    ids = found["text"].values
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
        if length:
            ids[row, length - 1] = EOS
    pixels = Padded(found["image"].values.to(dtype) / 255)
    return {"image": pixels, "text": Padded(ids, mask_of(lengths, 12), Lengths(lengths) if known else None)}


def loss_of(model: MultimodalModel, given: dict[str, Padded], micro: int | None = None) -> torch.Tensor:
    outputs = model(given) if micro is None else forward_in_micro_batches(model, given, micro)
    loss = ContrastiveLoss()(outputs)
    return loss + 2 * PredictionLoss()(outputs) if outputs.predictions else loss


def gradients(model: MultimodalModel, given: dict[str, Padded], micro: int | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = loss_of(model, given, micro)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-10, msg=name)


def one_by_one(encoder: TextEncoder, values: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Pooled rows, each encoded alone, without any padding."""
    return torch.cat([encoder(values[i : i + 1, :n]).pooled for i, n in enumerate(lengths)])


@pytest.fixture(autouse=True)
def only_given_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run without lengths be the padded one, as it is on a GPU."""
    monkeypatch.setattr("mmpretrain.encoders.text.known_lengths", lambda mask, lengths: lengths)


@functools.cache
def built(family: str, checkpointing: bool) -> MultimodalModel:
    model = FAMILIES[family]().double().train()
    if checkpointing:
        checkpoint_activations(model, "full")
    return model


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(lengths=LENGTHS, micro=st.sampled_from([None, 1, 2, 3]), checkpointing=st.booleans())
def test_every_gradient_is_that_of_the_padded_run(family, lengths, micro, checkpointing):
    model = built(family, checkpointing)
    assert_equal(gradients(model, batch(lengths, True), micro), gradients(model, batch(lengths, False)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [[2], [12], [2] * 9, [12] * 4, [12, 2, 2, 2, 2, 2], [3, 12, 7, 2, 5, 5, 9], *EMPTY])
def test_extreme_lengths_give_the_gradients_of_the_padded_run(family, lengths):
    model = built(family, False)
    assert_equal(gradients(model, batch(lengths, True)), gradients(model, batch(lengths, False)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("known", [True, False])
def test_ids_in_padding_change_nothing(family, known):
    model, given = built(family, False), batch([4, 2, 7, 12, 3], known)
    want = gradients(model, given)
    values, mask, _ = given["text"]
    garbage = torch.randint(1, VOCAB, values.shape, generator=torch.Generator().manual_seed(3))
    given["text"] = given["text"]._replace(values=torch.where(mask, values, garbage))
    assert_equal(gradients(model, given), want)


@pytest.mark.parametrize("options", [{}, {"pooling": "class_token"}, {"causal": False, "pooling": "mean"}])
def test_a_batch_gives_what_each_row_gives_alone(options):
    torch.manual_seed(0)
    encoder, lengths = TextEncoder(VOCAB, 12, 32, 2, 2, EOS, **options).double(), [2, 9, 3, 5, 2, 4]
    text = batch(lengths, True)["text"]
    encoded = encoder(*text)
    torch.testing.assert_close(encoded.pooled, one_by_one(encoder, text.values, lengths), rtol=0, atol=1e-12)
    assert encoded.tokens.shape == (6, 12, 32) and encoded.tokens.isfinite().all()
    assert encoded.lengths is text.lengths


def test_padded_tokens_pass_no_gradient():
    encoder, text = built("coca", False).encoders["text"], batch([4, 2, 7], True)["text"]
    encoder.zero_grad()
    encoder(*text).tokens[~text.mask].square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in encoder.parameters())


def test_without_given_lengths_a_cpu_finds_them(monkeypatch):
    monkeypatch.undo()
    mask = mask_of([2, 5, 3], 6)
    assert known_lengths(mask, None).counts.tolist() == [2, 5, 3]
    assert known_lengths(mask.flip(1), None) is None and known_lengths(None, None) is None
    assert known_lengths(mask.to("meta"), None) is None
    given = Lengths([2, 5, 3])
    assert known_lengths(mask, given) is given


def test_a_caption_is_asked_only_for_what_is_there():
    model, lengths = built("coca", False), [3, 12, 5, 2, 2, 2]
    prediction = model(batch(lengths, True)).predictions["caption"]
    text = batch(lengths, True)["text"]
    asked = [int(text.values[row, i]) for row, n in enumerate(lengths) for i in range(1, n)]
    places = len(prediction.labels)
    assert prediction.hidden.shape == (places, 32) and places < sum(lengths) + 16
    assert prediction.labels.tolist() == asked + [-100] * (places - len(asked))


@pytest.mark.parametrize("lengths", EMPTY)
def test_a_caption_head_asks_all_beside_empty_rows(lengths):
    labels = CaptionHead(VOCAB, 4)({"text": torch.randn(len(lengths), 12, 4)}, batch(lengths, True)).labels
    assert int((labels != -100).sum()) == sum(max(n - 1, 0) for n in lengths)


@pytest.mark.parametrize("found", [True, False], ids=["on a CPU", "padded"])
@pytest.mark.parametrize("options", [{}, {"pooling": "class_token"}, {"causal": False, "pooling": "mean"}])
def test_an_empty_row_reads_no_other(options, found, monkeypatch):
    if found:
        monkeypatch.undo()
    encoder = TextEncoder(VOCAB, 12, 32, 2, 2, EOS, **options).double()
    ids, mask, _ = batch([0, 9, 2], False)["text"]
    other = ids.clone()
    other[1:, 0] += 1
    before, after = encoder(ids, mask), encoder(other, mask)
    assert torch.equal(before.pooled[0], after.pooled[0]) and before.pooled.isfinite().all()
    assert not torch.equal(before.pooled[1], after.pooled[1])


@pytest.mark.filterwarnings("ignore")  # tracing warns of shapes, and is deprecated
@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
@pytest.mark.parametrize("family", ["clip", "coca"])
def test_a_recorded_graph_keeps_no_lengths_of_its_example(family, given, monkeypatch):
    monkeypatch.undo()
    model = FAMILIES[family]().eval()

    class Recorded(torch.nn.Module):
        def __init__(self, lengths):
            super().__init__()
            self.model, self.lengths = model, lengths

        def forward(self, image, ids, mask):
            outputs = self.model({"image": Padded(image), "text": Padded(ids, mask, self.lengths)})
            asked = [hidden * (labels != -100)[..., None] for hidden, _, labels in outputs.predictions.values()]
            return outputs.embeddings["text"], *asked

    (short, long) = (batch(lengths, False, torch.float32) for lengths in ([3, 4, 3, 2], [12, 12, 11, 10]))
    example, use = (tuple(p for m in ("image", "text") for p in b[m][:2] if p is not None) for b in (short, long))
    module = Recorded(Lengths([3, 4, 3, 2]) if given else None)
    graphs = torch.jit.trace(module, example, check_trace=False), torch.export.export(module, example).module()
    uses = [use] if given else [use, (*use[:2], use[2].flip(1))]  # padding first has no lengths
    for graph, inputs in itertools.product(graphs, uses):
        for ours, want in zip(graph(*inputs), Recorded(None)(*inputs), strict=True):
            torch.testing.assert_close(ours, want, rtol=0, atol=1e-5)


def test_lengths_that_are_not_the_masks_are_named():
    encoder, head = TextEncoder(VOCAB, 12, 32, 1, 2, EOS), CaptionHead(VOCAB, 4)
    ids, mask, _ = batch([3, 9, 5], False)["text"]
    holes = torch.tensor([[1] * 3 + [0] * 9, [0] * 3 + [1] * 9, [1] * 5 + [0] * 7]).bool()
    for shown, lengths, says in [
        (mask, [3, 2, 5], "row 1 has length 2"),
        (mask, [3, 9, 12], "row 2 has length 12"),
        (mask, [3, 9], "lengths have 2 rows, the batch has 3"),
        (holes, [3, 9, 5], "row 1 has length 9, but its mask says 000111111111"),
        (None, [12, 12, 7], "row 2 has length 7"),
    ]:
        text = Padded(ids, shown, Lengths(lengths))
        with pytest.raises(InputError, match=says):
            encoder(*text)
        with pytest.raises(InputError, match=says):
            head({"text": torch.randn(3, 12, 4)}, {"text": text})


@pytest.mark.parametrize("fused", [True, False])
def test_a_query_that_may_read_nothing_gets_zeros_and_passes_no_gradient(fused):
    attention = Attention(8, 2).double()
    attention.fused_attn = fused
    q, k, v = torch.randn(3, 2, 5, 2, 4, dtype=torch.float64).requires_grad_()
    mask = mask_of([5, 0], 5)[:, None, None, :]
    out = attention._attend(q, k, v, mask, False, None)
    assert not out[1].any()
    found = torch.autograd.grad(out.square().sum(), [q, k, v])
    alone = F.scaled_dot_product_attention(*(x[0].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
    torch.testing.assert_close(out[0], alone)
    assert all(g.isfinite().all() and not g[1].any() and g[0].any() for g in found)


@pytest.mark.skipif(varlen_attn is None, reason="this torch has no attention of packed rows")
@pytest.mark.parametrize(("major", "width", "has"), [(7, 64, False), (8, 64, True), (9, 256, True), (9, 264, False)])
def test_a_kernel_needs_a_new_enough_gpu_and_narrow_heads(major, width, has, monkeypatch):
    device = types.SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: device)
    assert has_kernel(torch.bfloat16, width, torch.device("cuda", 0)) is has
    assert not has_kernel(torch.float32, width, torch.device("cuda", 0))
    assert not has_kernel(torch.bfloat16, width, torch.device("cpu"))


@settings(max_examples=50, deadline=None)
@given(REAL, st.sampled_from([-1, 0, 1]), st.integers(1, 9))
def test_packing_and_unpacking_are_inverse(lengths, extra, multiple):
    mask = mask_of(lengths, 12)
    packing = pack_places(mask, Lengths(lengths), extra, multiple)
    x = torch.randn(len(lengths), 12, 3, requires_grad=True)
    packed = packing.pack(x)
    assert len(packed) % multiple == 0 and len(packed) > sum(lengths) + extra * len(lengths)
    kept = mask_of([n + min(extra, 0) for n in lengths], 12)
    assert torch.equal(packing.unpack(packed)[kept], x[kept])
    assert torch.equal(packed[packing.kept], x[kept])
    packing.unpack(packed * 2).sum().backward()
    assert torch.equal(x.grad, 2.0 * kept[..., None].expand_as(x))


@settings(max_examples=30, deadline=None)
@given(REAL, st.booleans())
def test_attention_stays_within_a_row(lengths, causal):
    packing = pack_rows(mask_of(lengths, 12), Lengths(lengths), torch.float64, 4, causal)
    q, k, v = torch.randn(3, len(packing.row), 2, 4, dtype=torch.float64)
    out, start = packing.attend(q, k, v), 0
    for n in lengths:
        rows = (x[start : start + n].transpose(0, 1) for x in (q, k, v))
        want = torch.nn.functional.scaled_dot_product_attention(*rows, is_causal=causal).transpose(0, 1)
        torch.testing.assert_close(out[start : start + n], want, rtol=0, atol=1e-12)
        start += n
    assert out.isfinite().all()


def test_autocast_is_as_far_from_float64_as_the_padded_run():
    lengths = [3, 12, 5, 2, 7, 2]
    want = gradients(models.coca().double().train(), batch(lengths, True))
    with torch.autocast("cpu", torch.bfloat16):
        packed = gradients(models.coca().train(), batch(lengths, True, torch.float32))
        padded = gradients(models.coca().train(), batch(lengths, False, torch.float32))
    for name, exact in want.items():
        error, usual = (float((found[name] - exact).norm() / (exact.norm() + 1e-6)) for found in (packed, padded))
        assert error <= 2 * usual + 0.02, name


def test_lengths_say_what_is_wrong_and_travel_with_the_batch():
    with pytest.raises(InputError, match="one count"):
        Lengths([3, -1])
    tokenizer = ByteTokenizer(12)
    rows = [Drawn("mine", str(i), {"text": "a" * i}, None) for i in (1, 5, 3, 9)]
    text = Collate({"text": tokenizer})(rows).batches["mine"]["text"]
    assert text.lengths is not None and text.lengths.counts.tolist() == [3, 7, 5, 11]
    assert text.to("cpu").lengths is text.lengths
    part = text.rows(slice(1, 3))
    assert part.lengths is not None and part.lengths.counts.tolist() == part.mask.sum(1).tolist() == [7, 5]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 77), max_size=600))
def test_room_is_above_the_total_by_little(counts):
    lengths = Lengths(counts)
    assert lengths.total == sum(counts) and lengths.longest == max(counts, default=0)
    assert lengths.has_empty == (0 in counts)
    assert 1 <= lengths.room - lengths.total <= min(128, max(16, lengths.total // 16))
    assert lengths.longest <= lengths.width < lengths.longest + 9 and lengths.width % 8 == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_for_packed_rows_gives_what_windows_give(family):
    """bf16 on a GPU against float32 on it: as far apart as the padded run's bf16."""
    if not has_kernel(torch.bfloat16, 16, torch.device("cuda")):
        pytest.skip("this GPU has no kernel for packed rows")
    model, lengths = FAMILIES[family]().cuda().train(), [3, 12, 5, 2, 7, 2, 9, 4]
    exact = gradients(model, {m: p.to("cuda") for m, p in batch(lengths, True, torch.float32).items()})
    with torch.autocast("cuda", torch.bfloat16):
        packed = gradients(model, {m: p.to("cuda") for m, p in batch(lengths, True, torch.float32).items()})
        padded = gradients(model, {m: p.to("cuda") for m, p in batch(lengths, False, torch.float32).items()})
    for name, want in exact.items():
        error, usual = ((found[name] - want).norm() for found in (packed, padded))
        assert packed[name].isfinite().all() and error <= 2 * usual + 0.02 * want.norm() + 1e-6, name
