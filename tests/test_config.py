"""What a config may build, what only the command line may say, and what is hidden of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from mmpretrain.composition import check_given
from mmpretrain.config import build_saved, instantiate
from mmpretrain.errors import InputError
from mmpretrain.secrets import masked, masked_overrides, masked_text
from mmpretrain.yaml_files import check_yaml


@pytest.mark.parametrize(
    "target",
    [
        "mmpretrain.ImageEncoder",
        "mmpretrain.training.optim.warmup_cosine",
        "mmpretrain.datasets.openmoji.build",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.LambdaLR",
        "torch.nn.functional.relu",
        "torch.nn.functional.gelu",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "lightning.pytorch.plugins.environments.SLURMEnvironment",
        "lightning.pytorch.strategies.ModelParallelStrategy",
        "timm.optim.Muon",
        "timm.layers.LayerNorm2d",
        "torchmetrics.MetricCollection",
        "torchvision.datasets.ImageFolder",
        "torchvision.transforms.v2.RandomCrop",
    ],
)
def test_parts_of_a_run_are_allowed(target):
    assert callable(instantiate({"_target_": target, "_partial_": True}))


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("os.system", "allowed are mmpretrain."),
        ("torch.load", "allowed are"),
        ("mmpretrain", "allowed are"),
        (7, "allowed are"),
        (["os.system"], "allowed are"),
        (None, "allowed are"),
        ("mmpretrain.distributed.os.system", "really"),
        ("mmpretrain.runs.os.unlink", "really|imported"),
        ("mmpretrain.cli.main", "really"),
        ("mmpretrain.load", "really 'mmpretrain.pretrained.load'"),
        ("mmpretrain.train.train", "really|imported"),
        ("mmpretrain.config.instantiate", "really"),
        ("mmpretrain.shards_cli.main", "really"),
        ("mmpretrain.__main__.main", "private"),
        ("mmpretrain.data.manifest.Ledger.open", "really"),
        ("lightning.pytorch.LightningModule.load_from_checkpoint", "really"),
        ("lightning.pytorch.cli.LightningCLI", "really"),
        ("lightning.fabric.utilities.cloud_io._load", "private"),
        ("lightning.fabric.utilities.cloud_io.get_filesystem", "really"),
        ("timm.create_model", "really"),
        ("timm.models.load_checkpoint", "really"),
        ("timm.data.readers.reader_wds.ReaderWds", "really"),
        ("torch.nn.Module.load_state_dict", "really"),
        ("torch.nn.functional", "really"),
        ("torch.nn.functional.torch.load", "really"),
        ("torch.optim.Optimizer.load_state_dict", "really"),
        ("torchvision.datasets.utils.download_url", "really"),
        ("torchvision.datasets.utils.extract_archive", "really"),
        ("torchvision.datasets.LSUN", "really"),
        ("torchmetrics.utilities.checks.os.getenv", "really|imported"),
        ("mmpretrain.no_such", "cannot be imported"),
        ("mmpretrain..x", "cannot be imported"),
    ],
)
def test_what_runs_code_or_touches_files_is_refused(target, reason):
    with pytest.raises(InputError, match=rf"^part\.0\._target_ is .*{reason}"):
        instantiate({"part": [{"_target_": target, "_partial_": True}]})


def test_a_target_is_checked_as_it_is_resolved(monkeypatch):
    monkeypatch.setenv("PART", "os.system")
    with pytest.raises(InputError, match=r"^a._target_ is 'os.system'"):
        instantiate(OmegaConf.create({"a": {"_target_": "${oc.env:PART}"}}))
    monkeypatch.setenv("PART", "{_target_: os.system, command: 'true'}")
    with pytest.raises(InputError, match=r"^a._target_ is 'os.system'"):
        instantiate(OmegaConf.create({"a": "${oc.create:${oc.decode:${oc.env:PART}}}"}))
    monkeypatch.setenv("PART", "${oc.create:{_target_: os.system}}")  # would be one after a second resolution
    with pytest.raises(InputError, match=r"^a\.0 is an interpolation where none is read"):
        instantiate(OmegaConf.create({"a": ["${oc.env:PART}"]}))
    with pytest.raises(InputError, match=r"^x._target_ is 'os.system'"):
        instantiate({"_target_": "torch.nn.Identity"}, x={"_target_": "os.system"})


def test_interpolations_to_the_rest_of_the_config_are_resolved():
    config = OmegaConf.create({"width": 3, "part": {"_target_": "torch.nn.Linear", "in_features": "${width}"}})
    assert instantiate(config.part, out_features=2).weight.shape == (2, 3)


def test_a_package_is_allowed_whole_on_the_callers_word():
    assert instantiate({"_target_": "fractions.Fraction.from_float", "f": 0.5}, allow=["fractions"]) == 0.5
    with pytest.raises(InputError, match="allowed are"):
        instantiate({"_target_": "fractions_of_another.Fraction"}, allow=["fractions"])
    for wrong in ("fractions", [""], [3]):
        with pytest.raises(InputError, match="allow_targets="):
            instantiate({}, allow=wrong)


def test_a_saved_model_is_built_of_parts_of_models_only():
    assert isinstance(build_saved({"_target_": "torch.nn.Identity"}), torch.nn.Identity)
    for target in ("torchvision.datasets.ImageFolder", "mmpretrain.training.optim.warmup_cosine", "torch.optim.SGD"):
        with pytest.raises(InputError, match="not allowed in a saved model"):
            build_saved({"_target_": target})


def test_a_saved_model_cannot_read_the_environment(monkeypatch):
    monkeypatch.setenv("HOSTILE", "7")
    with pytest.raises(InputError, match=r"^in_features is an interpolation"):
        build_saved({"_target_": "torch.nn.Linear", "in_features": "${oc.env:HOSTILE}", "out_features": 1})


def test_aliases_are_counted_before_they_are_written_out(tmp_path):
    lines = ["a0: &a0 [x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
    (tmp_path / "x.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"x\.yaml: its aliases stand for \d{8,} values"):
        check_yaml(tmp_path / "x.yaml")
    with pytest.raises(InputError, match="aliases stand for"):
        check_given("train", ["--config-dir", str(tmp_path), "seed=1"])
    for sound in ("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}", "a: [", "a: '*'"):
        (tmp_path / "x.yaml").write_text(sound)
        check_yaml(tmp_path / "x.yaml")
    for wrong in ("a: &a [*a]", "a: &a *a" + "[" * 3000):
        (tmp_path / "x.yaml").write_text(wrong)
        with pytest.raises(InputError, match="nested too deep") if wrong.endswith("]") else suppress(InputError):
            check_yaml(tmp_path / "x.yaml")


STRANGERS = {
    "targets": "allow_targets: [os]",
    "callback": "hydra: {callbacks: {x: {_target_: os.system, command: 'true'}}}",
    "logging": "hydra: {job_logging: {handlers: {x: {'()': os.system, command: 'true'}}}}",
    "hydra_logging": "hydra: {hydra_logging: {handlers: {x: {'()': os.system, command: 'true'}}}}",
    "environment": "hydra: {job: {env_set: {LD_PRELOAD: x.so}}}",
    "launcher": "hydra: {launcher: {_target_: os.system}}",
    "sweeper": "hydra: {sweeper: {_target_: os.system}}",
}


@pytest.fixture
def strangers(tmp_path: Path) -> Path:
    (tmp_path / "experiment").mkdir()
    for name, text in {**STRANGERS, "sound": "seed: 3"}.items():
        (tmp_path / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\nname: x\n{text}\n")
    return tmp_path


@pytest.mark.parametrize("name", STRANGERS)
def test_an_experiment_file_may_not_say_what_only_the_command_line_may(name, strangers):
    here = ["--config-dir", str(strangers)]
    with pytest.raises(InputError, match="only the command line may"):
        check_given("train", [*here, f"experiment={name}"])
    key = {"targets": "allow_targets", "callback": "hydra.callbacks", "logging": "hydra.job_logging"}.get(name)
    if key is not None:  # on the user's own word
        check_given("train", [*here, f"experiment={name}", f"{key}.x=1" if name != "targets" else f"{key}=[mine]"])


def test_files_are_found_wherever_hydra_finds_them(strangers):
    for arguments in (
        [f"hydra.searchpath=[file://{strangers}]", "experiment=callback"],
        ["-m", "--config-dir", str(strangers), "experiment=sound,callback", "seed=1,2"],
    ):
        with pytest.raises(InputError, match="only the command line may"):
            check_given("train", arguments)


def test_sound_experiments_and_the_command_line_itself_are_free(strangers):
    check_given("train", ["seed=1"])
    check_given("train", ["--config-dir", str(strangers), "experiment=sound", "allow_targets=[mine]"])
    check_given("train", ["--config-dir", str(strangers), "-m", "seed=range(3)", "hydra.job.env_set.X=1"])
    check_given("evaluate", ["--config-dir", str(strangers), "checkpoint=x", "hydra/job_logging=default"])
    with pytest.raises(InputError, match="pickle"):
        check_given("train", ["--experimental-rerun", "config.pickle"])


def test_secrets_are_masked_and_the_environment_stays_an_interpolation(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    config = OmegaConf.create(
        {
            "logger": {"api_key": "${oc.env:WANDB_API_KEY}", "again": "${logger.api_key}", "token": "hunter2"},
            "tokenizer": {"eos_token": "</s>", "max_tokens": 7, "path": "${oc.env:NO_SUCH,here}"},
            "data": ["https://me:hunter2@host/x.tar?X-Amz-Signature=hunter2&part=1", "s3://bucket/{000..009}.tar"],
            "url": "https://host/?key=${oc.env:WANDB_API_KEY}",
            "aws": {"secret_access_key": "hunter2", "password": None, "credentials": {"a": 1, "password": 123}},
        }
    )
    hidden = masked(config)
    assert "hunter2" not in str(hidden)
    assert hidden["logger"] == {
        "api_key": "${oc.env:WANDB_API_KEY}",
        "again": "${oc.env:WANDB_API_KEY}",
        "token": "***",
    }
    assert hidden["tokenizer"] == {"eos_token": "</s>", "max_tokens": 7, "path": "${oc.env:NO_SUCH,here}"}
    assert hidden["data"] == ["https://***@host/x.tar?X-Amz-Signature=***&part=1", "s3://bucket/{000..009}.tar"]
    assert hidden["aws"] == {"secret_access_key": "***", "password": None, "credentials": {"a": 1, "password": "***"}}
    assert OmegaConf.create(hidden).logger.again == "hunter2" == config.logger.api_key  # as it was, for the next run


def test_secrets_are_masked_in_text():
    assert masked_overrides(["seed=1", "+logger.wandb.api_key=x", "a.password=${oc.env:P}", "data=s3://u:p@h/x"]) == [
        "seed=1",
        "+logger.wandb.api_key=***",
        "a.password=${oc.env:P}",
        "data=s3://***@h/x",
    ]
    assert masked_text("https://me:p@ss@host/a.tar") == "https://***@host/a.tar"
    assert masked_text("s3://a@b:c@d@h/x@y.tar and http://host/u@v") == "s3://***@h/x@y.tar and http://host/u@v"
    message = "cannot fetch https://h/x.tar?sig=abc&Expires=3: 403"
    assert masked_text(message) == "cannot fetch https://h/x.tar?sig=***&Expires=3: 403"
    assert masked_text("write to a@b.org, see https://example.org/a?b=c") == (
        "write to a@b.org, see https://example.org/a?b=c"
    )
