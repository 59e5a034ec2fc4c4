"""Every shipped config composes and builds, on the meta device, with the published sizes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import lightning
import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch.loggers import Logger
from omegaconf import OmegaConf

from mmpretrain import MultimodalModel, Padded
from mmpretrain.composition import register_resolvers
from mmpretrain.config import instantiate
from mmpretrain.train import STEP, check_tokenizer
from mmpretrain.types import Loss, Tokenizer

CONFIGS = Path(str(files("mmpretrain.configs")))
MODELS = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))

# Millions of parameters: CLIP's from the paper's models as counted by open_clip, CoCa's as open_clip's coca_ViT-B-32
# without the differences of the paper's poolers (a second pooler, no projection inside the image encoder).
PARAMETERS = {
    "clip_vit_b32": 151.28,
    "clip_vit_b16": 149.62,
    "clip_vit_l14": 427.62,
    "clip_rn50": 102.01,
}


@pytest.fixture(autouse=True)
def _hydra(tmp_path, monkeypatch):
    register_resolvers()
    monkeypatch.setenv("MMPRETRAIN_RUN_ID", "test")
    with initialize_config_module("mmpretrain.configs", version_base="1.3"):
        yield


def config(*overrides: str, name: str = "train"):
    return compose(name, overrides=list(overrides))


def on_meta(part) -> MultimodalModel:
    with torch.device("meta"):
        return instantiate(part)


def test_the_lists_are_those_promised():
    promised = (
        "clip_tiny clip_vit_b32 clip_vit_b16 clip_vit_l14 clip_convnext_base siglip_vit_b16 coca_vit_b32 coca_vit_l14"
    )
    assert set(promised.split()) <= set(MODELS)
    assert set(EXPERIMENTS) == {"openmoji_lit"} | {
        f"{data}_{m}" for data in ("openmoji", "image_text") for m in ("clip", "siglip", "coca")
    }


@pytest.mark.parametrize("name", MODELS)
def test_models_build_on_the_meta_device_and_run(name):
    tokenizer = {"siglip": "siglip", "coca": "coca"}.get(name.split("_")[0], "clip")
    composed = config(f"model={name}", f"tokenizer={tokenizer}", "data.image_size=64")
    model = on_meta(composed.model)
    side = 64 if name.endswith("tiny") else 224
    length = composed.tokenizer.context_length
    batch = {
        "image": Padded(torch.zeros(2, 3, side, side, device="meta")),
        "text": Padded(torch.zeros(2, length, dtype=torch.long, device="meta")),
    }
    outputs = model(batch)
    assert {m: tuple(e.shape) for m, e in outputs.embeddings.items()} == dict.fromkeys(batch, (2, model.embed_dim))
    if name in PARAMETERS:
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.01)
    if name.startswith("coca"):
        assert outputs.predictions["caption"].hidden.shape[:2] == (2, length - 1)


def test_vit_b32_has_clips_302_tensors():
    model = on_meta(config("model=clip_vit_b32").model)
    names = [name for name, _ in model.named_parameters()]
    # Upstream stacks q, k, v of text attention into one weight and one bias; we keep six.
    stacked = {name for name in names if ".attention.k." in name or ".attention.v." in name}
    assert len(names) - len(stacked) == 302


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_build(name, tmp_path):
    shards = ["data.train=none.tar"] if name.startswith("image_text") else []
    composed = config(f"experiment={name}", *shards)
    OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    model, tokenizer = on_meta(composed.model), instantiate(composed.tokenizer)
    assert isinstance(tokenizer, Tokenizer)
    check_tokenizer(model, tokenizer)
    for loss in instantiate(composed.losses)["losses"].values():
        assert callable(loss) and isinstance(loss, object) and Loss is not None
    optimizer = instantiate(composed.optimizer)
    small = torch.nn.Linear(4, 4)
    built = optimizer["optimizer"](optimizer["groups"](small, optimizer["weight_decay"]))
    instantiate(composed.scheduler)(built)
    instantiate(composed.data.module)
    instantiate(composed.data.preprocess)
    instantiate(composed.evaluators)


@pytest.mark.parametrize("name", ["cpu", "ddp_cpu", "gpu", "ddp", "fsdp"])
def test_trainers_build(name):
    composed = config(f"trainer={name}")
    assert composed.trainer.max_steps >= 1
    if name in ("cpu", "ddp_cpu"):
        arguments = {key: value for key, value in composed.trainer.items() if key not in STEP}
        built = instantiate(arguments, logger=False, enable_checkpointing=False)
        assert isinstance(built, lightning.Trainer)
    else:  # no GPU here: the arguments must at least be the trainer's own
        import inspect

        known = inspect.signature(lightning.Trainer).parameters
        assert set(composed.trainer) - {"_target_", *STEP} <= set(known)


def test_tensorboard_logger_builds(tmp_path):
    composed = config("logger=tensorboard", f"run_dir={tmp_path}")
    assert isinstance(instantiate(composed.logger)["tensorboard"], Logger)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_loggers_name_a_lightning_class(name):
    import lightning.pytorch.loggers as loggers

    (logger,) = config(f"logger={name}").logger.values()
    assert hasattr(loggers, logger._target_.rsplit(".", 1)[-1])


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "evaluators").glob("*.yaml")))
def test_evaluators_build(name):
    extra = ["data.val=x.tar", "data.root=x", "data.class_names=[a,b]", "data.pictures=x"]
    composed = config(f"evaluators={name}", *extra, name="evaluate")
    assert isinstance(instantiate(composed.evaluators), dict)


def test_frozen_encoders_and_languages_by_config():
    model = on_meta(config("model.freeze=[image]").model)
    assert not any(p.requires_grad for p in model.encoders["image"].parameters())
    field = instantiate(config("data.languages=[en,de,fr]").data.module).sources["image_text"].fields["text"]
    assert field.choose == ("en", "de", "fr")


def test_openmoji_labels_in_the_config_are_the_data_sets():
    from mmpretrain.datasets import openmoji

    composed = config().evaluators
    assert list(composed.skin_tone.data.classes) == list(openmoji.SKIN_TONES)
    assert list(composed.skin_tone.class_names) == list(openmoji.SKIN_TONES.values())
    assert tuple(composed.skin_tone.templates) == openmoji.TEMPLATES_SKIN_TONE
    assert list(composed.kind.data.classes) == list(openmoji.KINDS)
    assert list(composed.kind.class_names) == list(openmoji.KINDS.values())
    assert tuple(composed.kind.templates) == openmoji.TEMPLATES_KIND
