"""Low-rank adapters (Hu et al. 2021) through `peft`: beside attention, trained alone, merged when a model is saved.

Where adapters go is found by what a module is, not by what a model is called: a module that holds linear layers for
query, key and value, under one of the names that ours, timm and transformers give them, is attention.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmpretrain.errors import InputError
from mmpretrain.model import MultimodalModel
from mmpretrain.whole_file import write_whole

INPUTS = (
    {"q", "k", "v"},
    {"q", "kv"},
    {"qkv"},
    {"to_q", "to_k", "to_v"},
    {"q_proj", "k_proj", "v_proj"},
    {"q_lin", "k_lin", "v_lin"},
    {"query", "key", "value"},
)
"""Names of the linear layers that make an attention of the module that holds them."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What peft calls the files of an adapter."""
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


class Lora:
    """W x becomes W x + alpha / rank B A x, with A (rank,in) and B (out,rank) trained and W frozen; B begins as zero.

    `dropout` is applied to what A reads. `targets`: part of the model (an encoder's name, or `fusion`) -> names of
    linear layers, or the ends of them; None is all linear layers of every attention in encoders and fusion. Frozen
    encoders get none. Raises `InputError` for numbers out of range and where `peft` is not installed.
    """

    def __init__(
        self,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        numbers = all(isinstance(number, (int, float)) for number in (rank, alpha, dropout))
        if not numbers or rank < 1 or rank % 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
            raise InputError(
                f"finetune.lora has rank={rank}, alpha={alpha}, dropout={dropout}; expected a whole rank of at least "
                "1, a positive alpha and a dropout in [0, 1)"
            )
        given = targets.values() if isinstance(targets, Mapping) else () if targets is None else ("",)
        if any(isinstance(names, str) or not isinstance(names, Sequence) for names in given):
            raise InputError(
                f"finetune.lora.targets is {targets}; expected a list of layers for each part, such as {{text: [q, v]}}"
            )
        self.rank, self.alpha, self.dropout = int(rank), alpha, dropout
        self.targets = None if targets is None else {part: list(names) for part, names in targets.items()}

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank

    def attach(self, model: MultimodalModel) -> list[str]:
        """Put adapters into a model and freeze all else; returns the names of the layers. `InputError` if none fit."""
        peft, names = _peft(), list(self.layers(model))
        for name in names:
            attention = model.get_submodule(name.rpartition(".")[0])
            if hasattr(attention, "qkv_bias_separate"):  # else timm multiplies with the bare weight, past the adapter
                setattr(attention, "qkv_bias_separate", True)  # noqa: B010 (a module's attributes have no type)
        peft.inject_adapter_in_model(peft.LoraConfig(**self._options(names)), model)
        model.train(model.training)  # batch norms are frozen now too
        return names

    def layers(self, model: MultimodalModel) -> Iterator[str]:
        """Name the linear layers that get an adapter."""
        parts: dict[str, nn.Module | None] = {**model.encoders, "fusion": model.fusion}
        chosen = [part for part, module in parts.items() if module is not None and part not in model.frozen]
        if self.targets is not None:
            unknown = sorted(set(self.targets) - set(chosen))
            if unknown:
                raise InputError(
                    f"finetune.lora.targets names {', '.join(unknown)}; the parts that are trained are "
                    f"{', '.join(chosen) or 'none'}"
                )
            chosen = [part for part in chosen if part in self.targets]
        found = 0
        for part in chosen:
            module, start = parts[part], "fusion" if part == "fusion" else f"encoders.{part}"
            assert module is not None
            names = list(attention_layers(module) if self.targets is None else _named(module, self.targets[part]))
            if not names and self.targets is not None:
                raise InputError(f"finetune.lora.targets.{part}={self.targets[part]} is the name of no linear layer")
            found += len(names)
            yield from (f"{start}.{name}" for name in names)
        if not found:
            raise InputError(
                "finetune.lora finds no attention in what is trained; name linear layers with finetune.lora.targets"
            )

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of a model with adapters as that of one without, W + alpha / rank B A in place of W."""
        plain = {}
        for name, tensor in state.items():
            if name.endswith((_A, _B)):
                continue
            layer, base, last = name.rpartition(_BASE)
            if base and last == "weight" and layer + _A in state:
                a, b = state[layer + _A], state[layer + _B]
                wide = torch.promote_types(tensor.dtype, torch.float32)
                tensor = (tensor.to(wide) + self.scale * (b.to(wide) @ a.to(wide))).to(tensor.dtype)
            plain[f"{layer}.{last}" if base else name] = tensor
        return plain

    def save(self, folder: Path, state: Mapping[str, Tensor], base: str | None = None) -> None:
        """Write the adapters of a state alone, in peft's own format; `base` says what they were trained on."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        adapters = {
            "base_model.model." + name.replace(".default.", "."): tensor.contiguous()
            for name, tensor in state.items()
            if name.endswith((_A, _B))
        }
        layers = [name.removesuffix(_A) for name in state if name.endswith(_A)]
        options = {"peft_type": "LORA", **self._options(layers), "base_model_name_or_path": base}
        write_whole(folder / CONFIG, json.dumps(options, indent=1) + "\n")
        temporary = folder / f".{WEIGHTS}.part"
        save_file(adapters, temporary, metadata={"format": "pt"})
        temporary.replace(folder / WEIGHTS)

    def _options(self, layers: Sequence[str]) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(layers),
            "bias": "none",
        }


def merge_adapter(model: MultimodalModel, folder: str | Path) -> None:
    """Add a saved adapter (of `Lora.save`, or of peft over the same names) to the weights of a model, in place.

    Raises `InputError` where the adapter was made for another model, or is of a kind that is more than B A.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        options = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        tensors, lora = load_file(Path(folder) / WEIGHTS), Lora(options["r"], options["lora_alpha"])
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(f"{folder} holds no adapter to read ({error!r:.200}); give a run's") from error
    refused = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if options.get(key)]
    if options.get("peft_type") != "LORA" or refused or options.get("bias", "none") != "none":
        raise InputError(f"{folder} is no plain low-rank adapter ({', '.join(refused) or options.get('peft_type')})")
    weights = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): tensor for name, tensor in tensors.items()
    }
    layers = [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]
    if weights.keys() != {f"{layer}.lora_{part}" for layer in layers for part in "AB"}:
        raise InputError(f"{folder} holds other tensors than pairs of A and B; it is no plain low-rank adapter")
    parameters = dict(model.named_parameters())
    for layer in layers:
        weight, a, b = parameters.get(f"{layer}.weight"), weights[f"{layer}.lora_A"], weights[f"{layer}.lora_B"]
        if weight is None or weight.shape != (len(b), a.shape[-1]) or a.shape[0] != b.shape[-1]:
            raise InputError(f"{folder} is an adapter of another model: {layer} is missing here, or of another shape")
    with torch.no_grad():  # only now that all is known to fit
        for layer in layers:
            weight = parameters[f"{layer}.weight"]
            weight.add_((lora.scale * (weights[f"{layer}.lora_B"] @ weights[f"{layer}.lora_A"])).to(weight))


def attention_layers(module: nn.Module) -> Iterator[str]:
    """Name all linear layers of every attention in `module`: query, key, value (fused or not), and output."""
    for name, part in module.named_modules():
        linear = {child for child, layer in part.named_children() if isinstance(layer, nn.Linear)}
        if not any(names <= linear for names in INPUTS):
            continue
        yield from (f"{name}.{child}" if name else child for child in sorted(linear))
        # BERT keeps the output layer beside the module that attends.
        parent, _, last = name.rpartition(".")
        beside = f"{parent}.output.dense" if last == "self" else ""
        if beside and any(beside == other for other, layer in module.named_modules() if isinstance(layer, nn.Linear)):
            yield beside


def _named(module: nn.Module, ends: Sequence[str]) -> Iterator[str]:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and any(name == end or name.endswith(f".{end}") for end in ends):
            yield name


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(
            "finetune.lora needs peft; pip install 'mmpretrain-contrastive[finetune]', or set finetune=none"
        ) from error
    return peft
