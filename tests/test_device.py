"""A device that is not there is one sentence."""

from __future__ import annotations

import pytest
import torch

from mmpretrain.device import usable
from mmpretrain.errors import InputError


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", f"cuda:{torch.cuda.device_count()}", "xla"])
def test_what_cannot_be_used_is_refused(name: str):
    with pytest.raises(InputError, match="cannot be used"):
        usable(name)


def test_what_can_be_used_is_returned():
    assert usable("cpu") == usable(torch.device("cpu")) == torch.device("cpu")
