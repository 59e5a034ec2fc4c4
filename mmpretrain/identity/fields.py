"""What decides a saved model's numbers, as named values: options with their defaults, and what was built of them."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmpretrain.layers import ACTIVATIONS

if TYPE_CHECKING:
    from mmpretrain.pretrained import Pretrained

UNIMPORTANT = {
    "_convert_",
    "freeze",
    "gradient_checkpointing",
    "init",
    "logit_bias",
    "logit_scale",
    "pad_multiple",
    "path",
    "pretrained",
    "table_std",
}
"""Options that decide how a model is trained, begun or stored, not what it computes; scale and bias are weights."""

TOKENIZER = ("vocab_size", "context_length", "start_id", "eos_id", "pad_id", "pad")

KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "hard_swish": F.hardswish,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
PROBE = (-3.0, -1.0, -0.5, 0.5, 1.0, 3.0)
"""Where activations are compared: what one computes says more than what its class is called."""

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def fields(config: Mapping[str, Any], parts: Pretrained, folder: Path) -> dict[str, Any]:
    """Return name -> JSON value of everything that decides what the model of `folder` computes.

    Names are the config's own (`model.encoders.text.norm_eps`), or say what was built (`image.activations`).
    """
    model: Any = parts.model
    bias = model.logit_bias
    found: dict[str, Any] = {
        "precision": precision(folder),
        "embed_dim": model.embed_dim,
        "logit_scale": float(model.logit_scale.detach().exp()),
        "logit_bias": None if bias is None else float(bias.detach()),
    }
    for part, described in config.items():
        found.update(options(described, part))
    for name, encoder in model.encoders.items():
        found.update({f"{name}.{key}": value for key, value in _built(encoder).items()})
    found.update({f"tokenizer.{key}": getattr(parts.tokenizer, key, None) for key in TOKENIZER})
    vocabulary = getattr(parts.tokenizer, "vocabulary", None)
    if isinstance(vocabulary, Path):
        found["tokenizer.vocabulary"] = sha256(vocabulary)
    return found


def options(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Walk a config: (key path, value) of each option, those that are not given with the constructor's default."""
    if isinstance(config, Mapping):
        for key, value in {**_defaults(config.get("_target_")), **config}.items():
            if key == "_target_":
                yield f"{path}.class", str(value).rpartition(".")[2]
            elif key not in UNIMPORTANT:
                yield from options(value, f"{path}.{key}")
    elif isinstance(config, (list, tuple)):
        if all(_plain(value) for value in config):
            yield path, list(config)
        else:
            for number, value in enumerate(config):
                yield from options(value, f"{path}.{number}")
    elif _plain(config):
        yield path, config


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say of each field that both have what it is and what it was.

    A field that only one side has is an option that came or went with a version of this library, or one that was added
    to the config: the golden vectors decide.
    """
    return [
        f"{name} is {now[name]!r}, the card says {then!r}"
        for name, then in saved.items()
        if name in now and not _same(then, now[name])
    ]


def precision(folder: Path) -> str:
    """Return the types of the weights as they are stored, such as `float32`."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a dict)
    return ", ".join(sorted(DTYPES.get(kind, kind.lower()) for kind in kinds))


def sha256(file: Path) -> str:
    """Hash a file, block by block."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _defaults(target: Any) -> dict[str, Any]:
    """Return the defaults of the class that a config names; none where it cannot be found (it was built before)."""
    from hydra.utils import get_object

    if not isinstance(target, str):
        return {}
    try:
        parameters = inspect.signature(get_object(target)).parameters
    except Exception:  # importing a stranger's name raises anything; `build_saved` has said so already
        return {}
    return {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _built(encoder: nn.Module) -> dict[str, Any]:
    """Return what the config alone does not say: pooling, input size, activations and epsilons as they were built."""
    found: dict[str, Any] = {}
    modules: list[Any] = list(encoder.modules())
    activations = {label for module in modules for label in _activations(module)}
    epsilons = {float(module.eps) for module in modules if isinstance(getattr(module, "eps", None), float)}
    pooling = {module.global_pool for module in modules if isinstance(getattr(module, "global_pool", None), str)}
    sizes = [module.img_size for module in modules if isinstance(getattr(module, "img_size", None), tuple)]
    for name, value in (
        ("activations", sorted(activations)),
        ("norm_eps", sorted(epsilons)),
        ("pooling", sorted(pooling)),
        ("input_size", list(sizes[0]) if sizes else []),
    ):
        if value:
            found[name] = value
    return found


def _activations(module: nn.Module) -> Iterator[str]:
    """Name the activation that a module is, or holds as a function."""
    held = getattr(module, "activation", None)
    home = type(module).__module__
    if home.startswith(("torch.nn.modules.activation", "timm.layers.activations", "transformers.activations")):
        held = module if next(module.parameters(), None) is None else None
    if callable(held) and (held is module or not isinstance(held, nn.Module)):
        label = _label(held)
        if label is not None:
            yield label


def _label(function: Callable[[Tensor], Tensor]) -> str | None:
    probe = torch.tensor(PROBE)
    try:
        values = function(probe.clone())
    except Exception:  # no function of one tensor alone
        return None
    if not isinstance(values, Tensor) or values.shape != probe.shape:
        return None
    for name, known in KNOWN.items():
        if torch.allclose(values, known(probe), atol=1e-6, rtol=0):
            return name
    return "other: " + ", ".join(f"{value:.5f}" for value in values.tolist())


def _same(then: Any, now: Any) -> bool:
    if isinstance(then, (list, tuple)) and isinstance(now, (list, tuple)):
        return len(then) == len(now) and all(_same(a, b) for a, b in zip(then, now, strict=True))
    numbers = [isinstance(value, (int, float)) and not isinstance(value, bool) for value in (then, now)]
    if all(numbers):
        return math.isclose(then, now, rel_tol=1e-6) or (math.isnan(then) and math.isnan(now))
    return type(then) is type(now) and bool(then == now)
