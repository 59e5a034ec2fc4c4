"""Name tables read both ways give back what they were given, and say what does not belong."""

from __future__ import annotations

import pytest
import torch

from mmpretrain.errors import InputError
from mmpretrain.interop.names import beneath, check_keys, joined, same, shaped, split, to_ours, to_theirs, transposed

TABLE = [
    same("ln_{n}.{p}", "norms.{n}.{p}"),
    transposed("proj", "projection.weight"),
    shaped("scale", "logit_scale", lambda x: x.reshape(1), lambda x: x.reshape(())),
    joined("attn.{n}.in_{p}", ["a.{n}.q.{p}", "a.{n}.k.{p}", "a.{n}.v.{p}"]),
    split(["pool.k.{p}", "pool.v.{p}"], "pool.kv.{p}"),
]


def tensors() -> dict[str, torch.Tensor]:
    made = {"ln_0.weight": (4,), "ln_12.bias": (4,), "proj": (4, 2), "scale": (), "attn.3.in_weight": (12, 4)}
    made |= {"pool.k.weight": (2, 4), "pool.v.weight": (2, 4)}
    return {name: torch.randn(shape) for name, shape in made.items()}


@pytest.mark.parametrize("prefix", ["", "text."])
def test_there_and_back_is_the_same_to_the_bit(prefix):
    theirs = {prefix + name: tensor for name, tensor in tensors().items()}
    table = beneath(TABLE, prefix, "encoders.")
    ours = to_ours(theirs, table, "their file")
    assert ours["encoders.projection.weight"].shape == (2, 4)
    assert ours["encoders.logit_scale"].shape == (1,)
    assert torch.equal(ours["encoders.a.3.k.weight"], theirs[f"{prefix}attn.3.in_weight"][4:8])
    back = to_theirs(ours, table, "their file")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def test_what_has_no_place_and_what_lacks_its_partner_is_named():
    given = tensors() | {"head.weight": torch.zeros(1)}
    del given["pool.v.weight"]
    with pytest.raises(InputError, match=r"weights\.pt: no place for head\.weight, pool\.k\.weight; missing .*pool\.v"):
        to_ours(given, TABLE, "weights.pt")


@pytest.mark.parametrize("shape", [(), (1,), (2, 2)])
def test_shapes_that_no_conversion_takes_are_named(shape):
    with pytest.raises(InputError, match=r"weights\.pt: wrong shapes attn\.3\.in_weight \(.*a\.3\.q\.weight"):
        to_ours(tensors() | {"attn.3.in_weight": torch.zeros(shape)}, TABLE, "weights.pt")


def test_a_first_partner_that_is_not_there_is_named_too():
    given = tensors()
    del given["pool.k.weight"]
    with pytest.raises(InputError, match=r"no place for pool\.v\.weight; missing partners: pool\.k\.weight"):
        to_ours(given, TABLE, "weights.pt")


def test_a_partner_that_several_lack_is_named_once():
    table = [split(["q.{p}", "k.{p}", "v.{p}"], "qkv.{p}")]
    with pytest.raises(InputError, match=r"no place for k\.bias, v\.bias; missing partners: q\.bias\. The"):
        to_ours({"k.bias": torch.zeros(2), "v.bias": torch.zeros(2)}, table, "x")


def test_keys_and_shapes_that_differ_are_all_named():
    expected = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    check_keys(expected, expected, "x")
    with pytest.raises(
        InputError, match=r"x does not fit .*missing c; extra d; wrong shapes b \(4,\) instead of \(3,\)"
    ):
        check_keys({"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)}, expected, "x")
