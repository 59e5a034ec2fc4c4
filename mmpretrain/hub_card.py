"""What is pushed beside a model: a model card in markdown, and how the run that made it was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmpretrain.errors import InputError
from mmpretrain.identity import read_card

SHOWN = ("preprocess.image_size", "preprocess.resize", "preprocess.interpolation", "preprocess.read")
PICTURE_TASK = "zero-shot-image-classification"
MOST_BYTES = 2**24


def model_card(folder: Path, repository: str, licence: str | None = None) -> str:
    """Write the model card of the model folder `folder`: metrics, licence, training, and how to load it.

    Metrics and training are those of the run whose model it is (`RUN/model`); of another they are left out, and said
    to be. Raises `InputError` for a folder whose identity card cannot be read.
    """
    card = read_card(folder)
    config = None if card is None else card.fields
    encoders = sorted({name.split(".")[2] for name in config or {} if name.startswith("model.encoders.")})
    lines = ["---", "library_name: mmpretrain"]
    lines += [f"license: {licence}"] if licence else []
    lines += [f"pipeline_tag: {PICTURE_TASK}"] if {"image", "text"} <= set(encoders) else []
    lines += ["tags:", "- mmpretrain", *(f"- {name}" for name in encoders), "---", ""]
    lines += [f"# {repository.partition('/')[2]}", ""]
    source = "unknown" if card is None else _plain(card.source)
    lines += [f"Encoders into one shared space ({', '.join(encoders) or 'see config.yaml'}). Source: {source}.", ""]
    lines += ["## Use", "", "```python", "import mmpretrain", ""]
    lines += [f'model, preprocess, tokenizer = mmpretrain.load("hf-hub:{repository}")']
    if {"image", "text"} <= set(encoders):
        lines += ['texts = model.embed("text", tokenizer(["a red bicycle"]))']
        lines += ['images = model.embed("image", preprocess(picture).unsqueeze(0))  # a PIL image']
    lines += ["```", "", "`identity.json` and `golden.safetensors` are what loading verifies.", ""]
    lines += ["## Licence", "", _plain(licence) if licence else "Not stated.", ""]
    lines += ["## Metrics", "", *(_metrics(folder) or ["None were pushed."]), ""]
    lines += ["## Model", "", *_model(config or {}), ""]
    lines += [
        "## Training",
        "",
        *(_training(folder) or ["Not known: the folder is not the model of a run (RUN/model)."]),
        "",
    ]
    return "\n".join(lines)


def training(folder: Path) -> bytes | None:
    """Return what of the run's manifest is published, as JSON; None where the model folder is no run's.

    The command line and the folders of the machine stay behind; secrets were masked when the manifest was written.
    """
    manifest = _manifest(folder)
    if manifest is None:
        return None
    kept = ("format", "time", "config", "seeds", "packages", "python", "platform", "git", "hardware", "init", "resumed")
    content = {key: _without_folders(manifest[key]) for key in kept if key in manifest}
    content["data"] = {name: _data(found) for name, found in manifest["shards"].items()}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _manifest(folder: Path) -> dict[str, Any] | None:
    from mmpretrain.provenance import read

    run = _run(folder)
    return None if run is None else read(run)


def _run(folder: Path) -> Path | None:
    """Return the run that made the model; what else lies in its folder, such as an average, it did not measure."""
    from mmpretrain.provenance import MANIFEST

    whole = folder.resolve()
    return whole.parent if whole.name == "model" and (whole.parent / MANIFEST).is_file() else None


def _metrics(folder: Path) -> list[str]:
    """Return a table of the run's finite metrics, with intervals and chance levels; nothing where there are none."""
    run = _run(folder)
    if run is None or not (file := run / "metrics.json").is_file():
        return []
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("too large")
        found = json.loads(file.read_bytes())
        metrics = {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is no file of metrics ({error}); remove it, or evaluate again") from error
    extra = ("/chance", "/ci_low", "/ci_high")
    rows = []
    for name, value in metrics.items():
        if name.endswith(extra) or not math.isfinite(value):
            continue
        low, high, chance = (metrics.get(f"{name}/{key}") for key in ("ci_low", "ci_high", "chance"))
        interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
        rows.append(f"| `{_plain(name)}` | {value:.4g} | {interval} | {'' if chance is None else f'{chance:.4g}'} |")
    return ["| metric | value | 95 % interval | chance |", "| --- | --- | --- | --- |", *rows] if rows else []


def _model(config: Mapping[str, Any]) -> Iterator[str]:
    names = ["embed_dim", "precision", *SHOWN, "tokenizer.class", "tokenizer.vocab_size", "tokenizer.context_length"]
    names += [name for name in config if name.endswith((".backbone.class", ".pooling", ".activations", ".name"))]
    for name in dict.fromkeys(names):
        if name in config:
            yield f"- `{_plain(name)}`: `{_plain(config[name])}`"


def _training(folder: Path) -> list[str]:
    manifest = _manifest(folder)
    if manifest is None:
        return []
    config = manifest["config"]
    trainer = config.get("trainer") if isinstance(config.get("trainer"), Mapping) else {}
    lines = []
    for name, found in manifest["shards"].items():
        data = _data(found)
        lines.append(
            f"- data `{_plain(name)}`: {data['samples']} samples in {data['shards']} shards, digest `{data['digest']}`"
        )
    for label, value in (
        ("steps", trainer.get("max_steps")),
        ("precision", trainer.get("precision")),
        ("global batch size", (config.get("data") or {}).get("global_batch_size")),
        ("seed", manifest.get("seeds", {}).get("seed")),
        ("started", manifest.get("time")),
    ):
        if value is not None:
            lines.append(f"- {label}: {_plain(value)}")
    packages = manifest["packages"]
    named = [f"{name} {packages[name]}" for name in ("mmpretrain", "torch", "timm", "lightning") if name in packages]
    lines.append(f"- versions: {_plain(', '.join(named))}, Python {_plain(manifest.get('python', ''))}")
    return [*lines, "", "Everything that decided the run is in `training.json`."]


def _data(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a source's shards is published: how much it was and a digest, not where it lay."""
    return {
        "samples": int(found.get("samples", 0)),
        "shards": len(found["shards"]),
        "lost": int(found.get("lost", 0)),
        "digest": _plain(found.get("digest", "")),
    }


def _without_folders(value: Any) -> Any:
    """Shorten absolute paths to their last part: they are of one machine, and often hold somebody's name."""
    if isinstance(value, Mapping):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return f".../{value.rstrip('/').rpartition('/')[2]}"
    return value


def _plain(value: Any) -> str:
    """Return a value as text of one line that markdown does not read as anything else."""
    text = " ".join((", ".join(map(str, value)) if isinstance(value, list) else str(value)).split())
    return "".join(c for c in text if c.isprintable()).translate(str.maketrans("", "", "`|<>[]"))[:300]
