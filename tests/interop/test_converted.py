"""What a converted model may hold: finite floats where the model has floats, and no interpolation anywhere."""

from __future__ import annotations

import pytest
import torch

from mmpretrain.errors import InputError
from mmpretrain.interop.converted import Converted, as_float32, build, write
from tests.interop.openai_models import released, tiny_clip


@pytest.fixture(scope="module")
def made():
    from mmpretrain.interop.openai import from_state_dict

    return from_state_dict(released(tiny_clip("vit")))


def changed(made: Converted, change) -> Converted:
    weights = dict(made.weights)
    for name in sorted(name for name, x in weights.items() if x.ndim == 2)[:2]:
        weights[name] = change(weights[name])
    return made._replace(weights=as_float32(weights))


def names(made: Converted) -> list[str]:
    return sorted(name for name, x in made.weights.items() if x.ndim == 2)[:2]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: (x * 100).to(torch.int8), "no floats: {0} (int8), {1} (int8)"),
        (lambda x: x > 0, "no floats: {0} (bool), {1} (bool)"),
        (lambda x: x.to(torch.complex64), "no floats: {0} (complex64), {1} (complex64)"),
        (lambda x: x.index_fill(0, torch.tensor([0]), torch.nan), "NaN or infinity (in float32) in {0}, {1}"),
        (lambda x: torch.full_like(x, -torch.inf), "NaN or infinity (in float32) in {0}, {1}"),
        (lambda x: x.double() + 1e300, "NaN or infinity (in float32) in {0}, {1}"),
    ],
    ids=["int8", "bool", "complex", "nan", "inf", "beyond float32"],
)
def test_weights_that_are_no_finite_floats_are_refused_by_name(made, change, said):
    with pytest.raises(InputError) as error:
        build(changed(made, change))
    assert said.format(*names(made)) in str(error.value)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken(made, kind):
    build(changed(made, lambda x: x.to(kind)))


@pytest.mark.parametrize("part", ["model", "preprocess", "tokenizer"])
def test_an_interpolation_in_any_part_is_refused_unread(made, part, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    for value in ("${oc.env:SECRET}", ["x", {"y": "<${oc.env:SECRET}>"}]):
        config = {**made.config, part: {**made.config[part], "eos_token": value}}
        with pytest.raises(InputError, match=rf"{part}\.eos_token[\w.]* is an interpolation"):
            write(made._replace(config=config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
