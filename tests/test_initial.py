"""`init`: training that begins with a saved model follows it, and is resumed, reproduced and merged as any other."""

from __future__ import annotations

import csv
import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmpretrain
from mmpretrain.cli import main
from mmpretrain.errors import InputError
from mmpretrain.initial import Source, adapt, check_identity, fill, identity
from mmpretrain.training.checkpoint import load as load_checkpoint
from mmpretrain.training.lora import Lora, merge_adapter
from mmpretrain.training.step_model import load_step
from tests import models
from tests.shard_sets import OVERRIDES
from tests.test_train import run_on_ranks

FOLLOWED = ("model", "tokenizer", "data.image_size")
STEPS = ["trainer.max_steps=4", "callbacks.checkpoint_every_n_steps=2"]


def run(*overrides: str) -> int:
    return main(["train", *overrides])


@pytest.fixture(scope="module")
def base(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of its own sizes, which is nothing like what `experiment=image_text_clip` would build."""
    folder = tmp_path_factory.mktemp("base") / "run"
    given = [*OVERRIDES, f"data.train={shards}", f"data.val={shards}", "evaluators=image_text", "report=false"]
    assert run(*given, "trainer.max_steps=2", f"run_dir={folder}") == 0
    return folder


@pytest.fixture
def tune(tiny: list[str], base: Path) -> list[str]:
    """What a user gives to go on from `base`: nothing about the model."""
    kept = [override for override in tiny if not override.lstrip("+").startswith(FOLLOWED)]
    return [*kept, *STEPS, f"init={base}/model"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def losses(folder: Path) -> dict[int, float]:
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["loss/total"]) for row in csv.DictReader(file) if row["loss/total"]}


def test_training_begins_with_the_saved_weights_and_follows_the_saved_parts(tune, base, tmp_path):
    folder = tmp_path / "tuned"
    assert run(*tune, "optimizer.lr=1e-12", "optimizer.weight_decay=0", f"run_dir={folder}") == 0
    for name, tensor in weights(base).items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=0, atol=1e-9, msg=name)
    model, preprocess, tokenizer = mmpretrain.load(folder)
    assert preprocess.image_size == 16 and tokenizer.vocab_size == 259 and model.embed_dim == 16
    (began,) = json.loads((folder / "manifest.json").read_text())["init"]
    assert began["name"] == f"{base}/model" and set(began["files"]) == {"config.yaml", "model.safetensors"}


def test_what_the_command_line_says_of_the_model_is_said_on_top(tune, tmp_path):
    folder = tmp_path / "tuned"
    frozen = ["finetune.freeze=[text]", "model.encoders.text.gradient_checkpointing=true"]
    assert run(*tune, "+model.encoders.text.gradient_checkpointing=true", frozen[0], f"run_dir={folder}") == 0
    saved = (folder / "model" / "config.yaml").read_text()
    assert "gradient_checkpointing: true" in saved
    assert mmpretrain.load(folder).model.frozen == {"text"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tokenizer.context_length=30", "init brings its own tokenizer"),
        ("tokenizer=clip", "init brings its own tokenizer"),
        ("data.image_size=32", "init brings its own data.image_size"),
        ("model=clip_vit_b32", "init brings its own model"),
        ("model.encoders.text.widht=3", "widht"),
        ("init=nowhere", "nowhere is not a model folder"),
        ("init={audio: BASE}", "has no encoder 'audio'"),
        ("finetune.freeze=text", "expected a list of encoders, such as [text]"),
        ("optimizer.layer_decay=2", "layer_decay is 2"),
        ("optimizer.layer_decay=abc", "layer_decay is abc"),
    ],
)
def test_what_does_not_fit_the_saved_model_is_refused(tune, base, tmp_path, given, message, capsys):
    overrides = [*tune, given.replace("BASE", f"{base}/model"), f"run_dir={tmp_path / 'no'}"]
    assert run(*overrides) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_an_encoder_of_a_saved_model_may_begin_another(tiny, base, tmp_path):
    """The text encoder comes with its tokenizer; the rest is built as the config says."""
    folder = tmp_path / "lit"
    kept = [o for o in tiny if not o.startswith(("tokenizer", "model.encoders.text"))]
    begin = ["model.embed_dim=24", f"init={{text: {base}/model}}", "finetune=lit", *STEPS, f"run_dir={folder}"]
    assert run(*kept, *begin) == 0
    model = mmpretrain.load(folder).model
    assert model.embed_dim == 24 and model.frozen == {"text"}
    for name, tensor in weights(base).items():
        if name.startswith("encoders.text."):
            assert torch.equal(weights(folder)[name], tensor), name
        elif name.startswith("encoders.image.") and tensor.ndim > 1:
            assert not torch.equal(weights(folder)[name], tensor), name


def test_adapters_are_resumed_merged_and_kept_alone(tune, base, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    lora = [*tune, "finetune=lora", "finetune.lora.dropout=0.1", "evaluators=none"]
    assert run(*lora, f"run_dir={whole}") == 0
    first = ["trainer.max_steps=2", "scheduler.total_steps=4"]
    assert run(*lora, *first, f"run_dir={parts}") == 0
    assert run(*lora, "finetune.lora.alpha=3", f"run_dir={parts}", "resume=auto") == 2
    assert "alpha=16.0, now 3" in capsys.readouterr().err
    assert run(*lora, f"run_dir={parts}", "resume=auto") == 0
    assert losses(whole) == losses(parts) and len(losses(whole)) == 4
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor), name
    assert weights(whole).keys() == weights(base).keys()
    tuned = mmpretrain.load(whole)
    started = mmpretrain.load(base)
    merge_adapter(started.model, whole / "adapter")
    ids = tuned.tokenizer(["red left 0", "blue top"])
    torch.testing.assert_close(tuned.model.embed("text", ids), started.model.embed("text", ids), rtol=0, atol=1e-5)
    assert not torch.equal(mmpretrain.load(base).model.embed("text", ids), tuned.model.embed("text", ids))


@pytest.fixture(scope="module")
def averaged(shards: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of adapters with a moving average of their weights."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    kept = [override for override in OVERRIDES if not override.lstrip("+").startswith(FOLLOWED)]
    data = [f"data.train={shards}", f"data.val={shards}", "evaluators=none", "report=false", f"init={base}/model"]
    lora = ["finetune=lora", "callbacks.ema.decay=0.5", "optimizer.lr=0.05", *STEPS]
    assert run(*kept, *data, *lora, f"run_dir={folder}") == 0
    return folder


def test_the_average_of_adapters_is_what_is_merged_and_kept(averaged, base):
    state = load_checkpoint(averaged / "checkpoints" / "step_00000004")
    average = state["callbacks"]["EMA"]["average"]
    trained = {name: tensor for name, tensor in state["state_dict"].items() if ".lora_" in name}
    assert {f"model.{name}" for name in average} == set(trained)
    assert not any(torch.equal(average[name.removeprefix("model.")], tensor) for name, tensor in trained.items())
    kept = load_file(averaged / "adapter" / "adapter_model.safetensors")
    assert {name.replace(".default.", ".") for name in average} == {n.removeprefix("base_model.model.") for n in kept}
    for name, tensor in average.items():
        assert torch.equal(kept["base_model.model." + name.replace(".default.", ".")], tensor), name
    model = mmpretrain.load(base).model
    merge_adapter(model, averaged / "adapter")
    for name, tensor in weights(averaged).items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_run_of_adapters_that_was_moved_is_loaded_and_goes_on(averaged, tune, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(averaged, moved, symlinks=True)
    found = load_step(moved / "checkpoints" / "step_00000004").model.state_dict()
    assert found.keys() == weights(averaged).keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(averaged).items())
    lora = [*tune, "finetune=lora", "callbacks.ema.decay=0.5", "optimizer.lr=0.05", "evaluators=none"]
    goes_on = ["trainer.max_steps=5", "scheduler.total_steps=4", f"run_dir={moved}", "resume=auto"]
    assert run(*lora, *goes_on) == 0
    assert list(losses(moved)) == [1, 2, 3, 4, 5]


def test_adapters_leave_a_plain_model_that_is_exported(averaged, tmp_path):
    pytest.importorskip("open_clip")
    assert not any("lora" in name or "base_layer" in name for name in weights(averaged))
    assert "lora" not in (averaged / "model" / "config.yaml").read_text()
    assert main(["export", "open_clip", str(averaged), str(tmp_path / "out")]) == 0


def test_encoders_to_lock_need_weights(tiny, tmp_path, capsys):
    assert run(*tiny, "finetune=lit", f"run_dir={tmp_path / 'no'}") == 2
    assert "finetune.freeze locks text, whose weights nothing gave; give init=MODEL" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_adapters_need_weights_to_lie_beside(tiny, tmp_path, capsys):
    assert run(*tiny, "finetune=lora", f"run_dir={tmp_path / 'no'}") == 2
    assert "those of image, text would stay as they are drawn" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_every_part_beside_adapters_needs_weights_and_what_joins_them_is_trained():
    def joint(config: dict, *parts: str | None, **targets: list[str]) -> set[str]:
        model = models.clip()
        adapt(Lora(targets=targets or None), model, [Source(part, "x", Path("x")) for part in parts], config)
        return {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}

    trained = {"projections.image.weight", "projections.text.weight", "logit_scale"}
    assert joint({}, None) == set()
    assert joint({}, "image", "text") == trained
    assert joint({"encoders": {"image": {"pretrained": True}, "text": {"pretrained": False}}}, "text") == trained
    with pytest.raises(InputError, match="those of text would"):
        joint({"encoders": {"text": {"pretrained": False}}}, "image")
    with pytest.raises(InputError, match="those of text would"):  # though it has no adapter
        joint({}, "image", image=["qkv"])
    with pytest.raises(InputError, match="those of fusion would"):
        adapt(Lora(), models.coca(), [Source(part, "x", Path("x")) for part in ("image", "text")], {})


def test_a_run_that_goes_on_must_begin_with_the_same_weights(tune, tiny, shards, base, tmp_path, capsys):
    folder, other = tmp_path / "run", tmp_path / "other"
    first = ["trainer.max_steps=2", "scheduler.total_steps=4", "evaluators=none"]
    assert run(*tune, *first, f"run_dir={folder}") == 0
    assert run(*tiny, "seed=5", "trainer.max_steps=2", "evaluators=none", f"run_dir={other}") == 0
    assert run(*tune, f"init={other}/model", f"run_dir={folder}", "resume=auto") == 2
    assert "is not what" in capsys.readouterr().err


def test_the_safe_preset_trains_near_the_original(tune, tmp_path):
    folder = tmp_path / "safe"
    assert run(*tune, "finetune=safe", "trainer.micro_batch_size=3", f"run_dir={folder}") == 0
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["loss/preservation"]]
    assert abs(float(rows[0]["loss/preservation"])) < 1e-6  # B begins as zero: the model is the original
    assert float(rows[-1]["loss/preservation"]) > 1e-7


def test_a_loss_that_compares_needs_a_whole_model_to_begin_with(tiny, tmp_path, capsys):
    assert run(*tiny, "finetune=safe", f"run_dir={tmp_path / 'no'}") == 2
    assert "init=MODEL" in capsys.readouterr().err


def test_a_run_goes_on_with_the_weights_and_rates_it_trained(tune, tmp_path, capsys):
    folder = [f"run_dir={tmp_path / 'run'}", "optimizer.layer_decay=0.5", "evaluators=none"]
    assert run(*tune, *folder, "trainer.max_steps=2", "scheduler.total_steps=4") == 0
    for other in ("finetune.freeze=[text]", "optimizer.layer_decay=null", "optimizer.layer_decay=0.6"):
        assert run(*tune, *folder, other, "resume=auto") == 2
        assert "resume with the finetune, optimizer and optimizer.layer_decay" in capsys.readouterr().err
    assert run(*tune, *folder, "resume=auto") == 0


def test_what_a_run_began_with_is_compared_part_by_part(base, tmp_path):
    began = [Source(part, "x", base / "model") for part in ("text", "image")]
    manifest = json.loads((base / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "init": identity(began)}))
    check_identity(tmp_path, began[::-1])
    with pytest.raises(InputError, match="began with init=x, x, this is init=x; give"):
        check_identity(tmp_path, began[:1])


def test_the_model_that_training_began_with_is_not_kept_where_no_loss_needs_it(tune, tmp_path, monkeypatch, capsys):
    began = []

    def filled(*given):
        whole = fill(*given)
        began.append(weakref.ref(whole))
        return whole

    def fit(*_):
        gc.collect()
        raise InputError("forgotten" if began[0]() is None else "kept")

    monkeypatch.setattr("mmpretrain.train.fill", filled)
    monkeypatch.setattr("mmpretrain.train.fit", fit)
    for finetune, said in (("lora", "forgotten"), ("safe", "kept")):
        began.clear()
        assert run(*tune, f"finetune={finetune}", f"run_dir={tmp_path / finetune}") == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_fine_tuned_run_is_reproduced(tune, base, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(*tune, "finetune=safe", "optimizer.layer_decay=0.7", "evaluators=none", f"run_dir={folder}") == 0
    assert main(["reproduce", str(folder)]) == 0
    captured = capsys.readouterr()
    assert "reproduced" in captured.out and "warning: config" not in captured.err


@pytest.mark.slow
def test_two_ranks_fine_tune_as_one(tune, tmp_path):
    common = [*tune, "finetune=safe", "evaluators=none"]
    assert run(*common, f"run_dir={tmp_path / 'one'}") == 0
    ranks = ["trainer=ddp_cpu", *STEPS, f"run_dir={tmp_path / 'two'}"]
    run_on_ranks(2, [*common, *ranks], tmp_path / "log")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    for step, loss in one.items():
        assert two[step] == pytest.approx(loss, rel=2e-5), step
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
