"""Training that begins with weights: `init` names a saved model, or one for each encoder, and the config follows it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf, open_dict
from torch import nn

from mmpretrain.errors import InputError
from mmpretrain.interop.names import check_keys
from mmpretrain.model import MultimodalModel
from mmpretrain.pretrained import CONFIG, NAMED, WEIGHTS, load, model_folder, read_config
from mmpretrain.provenance import MANIFEST, read
from mmpretrain.training.lora import Lora

FILES = (CONFIG, WEIGHTS, "tokenizer.json")
"""The files of a model folder that decide what training begins with."""


class Source(NamedTuple):
    """A model folder that training begins with: for one encoder, or for the whole model (part None)."""

    part: str | None
    name: str
    folder: Path

    @property
    def prefix(self) -> str:
        """What the names of its weights begin with."""
        return "" if self.part is None else f"encoders.{self.part}."


def follow(config: DictConfig, overrides: Sequence[str] = ()) -> list[Source]:
    """Let a training config follow what `config.init` names, in place, and apply `config.finetune.freeze`.

    A whole model brings its architecture, tokenizer and preprocessing; an encoder its own part, with the tokenizer for
    `text` and the preprocessing for `image`. `overrides` are those of the command line: what they say of the model is
    said again on top; one that sets tokenizer or preprocessing, or chooses another model, raises `InputError`, as does
    an encoder to freeze whose weights nothing gives.
    """
    sources = list(_sources(config.get("init")))
    with open_dict(config):
        for source in sources:
            _follow(config, source)
        if sources:
            _again(config, sources, overrides)
        freeze = (config.get("finetune") or {}).get("freeze")
        if freeze is not None:
            config.model.freeze = freeze
            model: Any = OmegaConf.to_container(config.model, resolve=False)
            named = freeze if OmegaConf.is_list(freeze) else ()  # anything else the model refuses
            locked = [part for part in model.get("encoders") or {} if part in named]
            if bare := _bare(locked, sources, model):
                raise InputError(
                    f"finetune.freeze locks {', '.join(bare)}, whose weights nothing gave; give init=MODEL (or "
                    "init.ENCODER=MODEL, or pretrained=true of an encoder); to lock it as it is drawn, set model.freeze"
                )
    return sources


def fill(model: nn.Module, sources: Sequence[Source], allow: Sequence[str] = ()) -> MultimodalModel | None:
    """Load the weights of `sources` into `model`; returns the whole model they came from, None where it was parts.

    Raises `InputError`, listing them, where names or shapes differ.
    """
    whole = None
    for source in sources:
        loaded = load(source.folder, allow=allow).model
        weights, expected = (
            {name: tensor for name, tensor in part.state_dict().items() if name.startswith(source.prefix)}
            for part in (loaded, model)
        )
        check_keys(weights, expected, f"init={source.name}")
        model.load_state_dict(weights, strict=False)
        if source.part is None:
            whole = loaded
    return whole


def identity(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Describe what training begins with, for its manifest: the names as given, and the SHA-256 of their files."""
    return [
        {
            "part": source.part,
            "name": source.name,
            "files": {name: _digest(source.folder / name) for name in FILES if (source.folder / name).is_file()},
        }
        for source in sources
    ]


def check_identity(run: Path, sources: Sequence[Source]) -> None:
    """Raise `InputError` where the manifest of a run folder, if it has one, says that it began with other weights."""
    if not (run / MANIFEST).is_file():
        return
    before, now = ({part["part"]: part for part in parts} for parts in (read(run).get("init", []), identity(sources)))
    if before.keys() != now.keys():
        began, given = (", ".join(str(part["name"]) for part in parts.values()) or "none" for parts in (before, now))
        raise InputError(f"{run} began with init={began}, this is init={given}; give the init it began with")
    for part, new in now.items():
        old = before[part]
        files = sorted({*old["files"], *new["files"]})
        changed = [name for name in files if old["files"].get(name) != new["files"].get(name)]
        if changed:
            raise InputError(
                f"init={new['name']} is not what {run} began with: {', '.join(changed)} differ; give back the model as "
                "it was, or another run_dir"
            )


def adapt(lora: Lora, model: MultimodalModel, sources: Sequence[Source], config: Mapping[str, Any]) -> None:
    """Put low-rank adapters into a model that began with `sources`; what joins parts of several is trained whole.

    `config` is the model's, in which `pretrained` says that an encoder loads weights. Raises `InputError` where
    nothing gave the weights of an encoder or of the fusion: beside adapters those stay as they are drawn.
    """
    lora.attach(model)
    if any(source.part is None for source in sources):
        return
    parts = [part for part in model.encoders if part not in model.frozen]
    parts += [] if model.fusion is None else ["fusion"]
    if bare := _bare(parts, sources, config):
        raise InputError(
            f"finetune.lora freezes all weights but the adapters, and those of {', '.join(bare)} would stay as they "
            "are drawn at the start; give init=MODEL (or init.ENCODER=MODEL, or pretrained=true of an encoder), or "
            "set finetune=none"
        )
    for joint in (model.projections, model.heads):
        joint.requires_grad_(True)
    for number in (model.logit_scale, model.logit_bias):
        if number is not None:
            number.requires_grad_(True)


def _bare(parts: Iterable[str], sources: Sequence[Source], model: Mapping[str, Any]) -> list[str]:
    """Name those of some parts of a model whose weights come from no source, nor from its config."""
    given, encoders = {source.part for source in sources}, model.get("encoders") or {}
    return [part for part in parts if not given & {None, part} and not _pretrained(encoders.get(part))]


def _pretrained(config: Any) -> bool:
    """Whether a part's config says anywhere that weights are loaded."""
    if isinstance(config, Mapping):
        return any((key == "pretrained" and bool(value)) or _pretrained(value) for key, value in config.items())
    return isinstance(config, list) and any(_pretrained(value) for value in config)


def _sources(init: Any) -> Iterator[Source]:
    if init is None:
        return
    if isinstance(init, str):
        named: dict[str | None, Any] = {None: init}
    elif isinstance(init, (Mapping, DictConfig)):
        named = {str(part): name for part, name in init.items() if name is not None}
    else:
        raise InputError(f"init is {init!r}; give a model folder, or {{encoder: model folder}}")
    for part, name in named.items():
        yield Source(part, str(name), _find(str(name)))


def _follow(config: Any, source: Source) -> None:
    saved = _parts(source.folder)
    encoders = saved["model"].get("encoders") or {}
    if source.part is None:
        config.model = saved["model"]
    elif source.part not in encoders or "encoders" not in config.model:
        raise InputError(
            f"init={source.name} has no encoder {source.part!r}: it has {', '.join(encoders) or 'none'}; name one"
        )
    else:
        config.model.encoders[source.part] = encoders[source.part]
    if source.part in (None, "text"):
        config.tokenizer = saved["tokenizer"]
    if source.part in (None, "image"):
        config.data.preprocess = saved["preprocess"]
        if "image_size" in saved["preprocess"]:
            config.data.image_size = saved["preprocess"]["image_size"]


def _again(config: Any, sources: Sequence[Source], overrides: Sequence[str]) -> None:
    """Apply once more what the command line says of the model, and refuse what the saved model decides."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parts = {source.part for source in sources}
    decided = [("tokenizer", "text"), ("data.preprocess", "image"), ("data.image_size", "image")]
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = str(override.key_or_group).replace("/", ".")
        for name, part in decided:
            if parts & {None, part} and (key == name or key.startswith(f"{name}.")):
                raise InputError(f"{override.input_line}: init brings its own {name}; leave this out")
        if key == "model" and None in parts:
            raise InputError(f"{override.input_line}: init brings its own model; leave this out, or set single keys")
        if not key.startswith(tuple(f"model.{source.prefix}" for source in sources)):
            continue
        known = OmegaConf.select(config, key, default=override) is not override
        if not known and not (override.is_add() or override.is_force_add()):
            raise InputError(f"{override.input_line}: the model of init has no {key}; add it with +{key}=...")
        if override.is_delete():
            parent, _, last = key.rpartition(".")
            del OmegaConf.select(config, parent)[last]
        else:
            OmegaConf.update(config, key, override.value(), force_add=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(name: str) -> Path:
    """Find the model folder that a path, or a name such as `package:NAME`, stands for."""
    if NAMED.match(name) and not Path(name).exists():
        from mmpretrain.interop.remote import resolve

        return resolve(name)
    return model_folder(Path(name)).resolve()


def _parts(folder: Path) -> dict[str, Any]:
    """Read what builds a saved model's parts, which will be part of our own config: no interpolations."""
    if "${" in (folder / CONFIG).read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{folder / CONFIG} has an interpolation where none is read; write the value itself")
    return read_config(folder)
