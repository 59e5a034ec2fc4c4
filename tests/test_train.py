"""`mmpretrain train` end to end on small real shards: the run folder, resuming, ranks, wrong input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import mmpretrain
from mmpretrain.cli import main
from mmpretrain.errors import EXIT_PREEMPTED, EXIT_STOPPED
from tests.faults.launch import start


def run(*overrides: str) -> int:
    return main(["train", *overrides])


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, with one thread."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def run_on_ranks(ranks: int, overrides: list[str], log: Path) -> None:
    """Train as under torchrun; launchers themselves are tested in tests/faults/test_signals.py."""
    started = start(ranks, ["train", *overrides], log)
    try:
        assert started.wait(300) == [0] * ranks, started.output()
    finally:
        started.kill()


def rows(folder: Path) -> dict[int, dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        return {int(r["step"]): {k: float(v) for k, v in r.items() if v and k != "step"} for r in csv.DictReader(file)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_folder_holds_everything(tiny, tmp_path, capsys):
    folder = tmp_path / "runs" / "first"
    assert run(*tiny, f"run_dir={folder}", "report=true", "callbacks.checkpoint_every_n_steps=3") == 0
    expected = {"model", "checkpoints", "metrics.json", "metrics.csv", "config.yaml", "report.html"}
    expected |= {"manifest.json", "data_events.jsonl"}
    assert {path.name for path in folder.iterdir()} == expected
    assert (folder.parent / "latest").resolve() == folder.resolve()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 <= metrics["val/retrieval/text_to_image/recall@1"] <= 1
    assert metrics["train/steps"] == 6 and metrics["train/truncated_captions"] == 0
    table = rows(folder)
    assert list(table) == [1, 2, 3, 4, 5, 6]
    for column in ("loss/total", "loss/contrastive", "logit_scale", "lr", "samples_per_second"):
        assert all(column in row for row in table.values())
    assert "recall@1" in capsys.readouterr().out
    model, preprocess, tokenizer = mmpretrain.load(folder.parent / "latest" / "model")
    assert model.embed("text", tokenizer(["red left"])).shape == (1, 16)
    assert preprocess.image_size == 16
    assert "${" not in (folder / "config.yaml").read_text()


@pytest.mark.slow
def test_resuming_goes_on_with_the_very_next_sample(tiny, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    drop = "model.encoders.image.model_args={img_size:32,depth:1,num_heads:2,patch_drop_rate:0.5}"  # random, too
    steps = ["callbacks.checkpoint_every_n_steps=2", "evaluators=none", drop, "data.image_size=32"]
    assert run(*tiny, *steps, f"run_dir={whole}") == 0
    # The same run, ended after 4 of its 6 steps by a signal, as Ctrl-C sends it.
    script = (
        "import os, signal, sys\n"
        "from mmpretrain.training import assembly\n"
        "from mmpretrain.cli import main\n"
        "class Kill(assembly.Metrics):\n"
        "    def on_train_batch_end(self, trainer, *rest):\n"
        "        super().on_train_batch_end(trainer, *rest)\n"
        "        if trainer.global_step == 4: os.kill(os.getpid(), signal.SIGINT)\n"
        "assembly.Metrics = Kill\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = launch("-c", script, "train", *tiny, *steps, f"run_dir={parts}")
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert "stopped at step 4 of 6" in done.stderr and "resume=auto" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (parts / "model").exists()
    assert run(*tiny, *steps, f"run_dir={parts}", "resume=auto") == 0
    want, got = rows(whole), rows(parts)
    assert list(got) == list(want)
    assert [r["loss/total"] for r in got.values()] == [r["loss/total"] for r in want.values()]
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor), name


def test_compiled_and_checkpointed_steps_are_those_of_a_plain_run(tiny, tmp_path):
    """Through resume, moving average, evaluation and saving; the traced graph runs as it is, without a compiler."""
    common = [*tiny, "trainer.max_steps=4", "callbacks.ema.decay=0.9", "callbacks.checkpoint_every_n_steps=2"]
    faster = ["trainer.compile=aot_eager", "trainer.activation_checkpointing=selective"]
    assert run(*common, f"run_dir={tmp_path / 'plain'}") == 0
    torch._dynamo.reset()
    folder = [f"run_dir={tmp_path / 'faster'}", *faster]
    assert run(*common, *folder, "evaluators=none", "trainer.max_steps=2", "scheduler.total_steps=4") == 0
    assert counters["stats"]["unique_graphs"] > 0
    assert run(*common, *folder, "resume=auto") == 0
    plain, got = (rows(tmp_path / name) for name in ("plain", "faster"))
    for step, values in plain.items():
        assert got[step]["loss/total"] == pytest.approx(values["loss/total"], rel=1e-4), step
    recall = "val/retrieval/text_to_image/recall@5"
    assert got[4][recall] == plain[4][recall]
    for name, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "faster")[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_workers_change_nothing(tiny, tmp_path):
    for workers in (0, 2):
        assert run(*tiny, f"data.num_workers={workers}", "evaluators=none", f"run_dir={tmp_path / str(workers)}") == 0
    a, b = (rows(tmp_path / name) for name in "02")
    assert [r["loss/total"] for r in a.values()] == [r["loss/total"] for r in b.values()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [[], ["losses=siglip", "+model.logit_bias=-10.0", "+model.logit_scale=10.0"]],
    ids=["clip", "siglip"],
)
def test_two_ranks_equal_one(tiny, tmp_path, extra):
    common = [*tiny, *extra]
    assert run(*common, f"run_dir={tmp_path / 'one'}") == 0
    ranks = ["trainer=ddp_cpu", "trainer.max_steps=6", f"run_dir={tmp_path / 'two'}", "report=true"]
    run_on_ranks(2, [*common, *ranks], tmp_path / "log")
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for step in one:
        for column in ("loss/total", "logit_scale"):
            assert two[step][column] == pytest.approx(one[step][column], rel=2e-5), (step, column)
    assert two[6]["val/retrieval/text_to_image/recall@5"] == one[6]["val/retrieval/text_to_image/recall@5"]
    for name, tensor in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_the_logit_scale_is_clamped_after_the_step(tiny, tmp_path):
    assert (
        run(
            *tiny,
            "+model.logit_scale=200.0",
            "evaluators=none",
            "trainer.max_steps=1",
            f"run_dir={tmp_path / 'r'}",
        )
        == 0
    )
    assert weights(tmp_path / "r")["logit_scale"].exp().item() == pytest.approx(100.0, rel=1e-6)


def test_best_checkpoint_and_evaluation_during_training(tiny, tmp_path):
    best = "callbacks.best.monitor=val/retrieval/text_to_image/recall@1"
    assert run(*tiny, "callbacks.evaluate_every_n_steps=2", best, f"run_dir={tmp_path / 'r'}") == 0
    assert {p.name for p in (tmp_path / "r" / "checkpoints").iterdir()} >= {"best", "latest"}
    assert [s for s, r in rows(tmp_path / "r").items() if "val/retrieval/text_to_image/recall@1" in r] == [
        2,
        4,
        6,
    ]


def test_multirun_makes_a_folder_each(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*tiny, "evaluators=none", "trainer.max_steps=1", "-m", "seed=0,1") == 0
    (sweep,) = (tmp_path / "runs" / "image_text_clip").glob("multirun_*")
    assert (sweep / "0" / "model").is_dir() and (sweep / "1" / "model").is_dir()


def test_help_and_config_are_shown(tiny, capsys):
    assert main(["train", *tiny, "--cfg", "job"]) == 0
    assert "mmpretrain.ImageEncoder" in capsys.readouterr().out
    for command, words in (
        (["train", "--help"], "openmoji_clip"),
        (["evaluate", "--help"], "checkpoint=PATH"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code in (0, None)
        assert words in capsys.readouterr().out


WRONG = {
    "misspelt key": (["trainer.max_step=3"], ["trainer.max_step", "trainer.max_steps"]),
    "misspelt group": (["modl=clip_tiny"], ["modl", "model"]),
    "unknown experiment": (
        ["experiment=image_text_clop"],
        ["image_text_clop", "image_text_clip", "openmoji_clip"],
    ),
    "no shards match": (["data.train=/nowhere/{00..03}.tar"], ["/nowhere/00.tar", "does not exist"]),
    "no caption field": (["data.captions.extension=caption"], ["caption", "png", "00000.tar"]),
    "fewer samples than a batch": (["data.global_batch_size=65"], ["64 samples", "65", "batch"]),
    "wrong vocabulary": (["model.encoders.text.vocab_size=300"], ["vocab_size 300", "259"]),
    "unsafe target": (["data.preprocess._target_=os.system"], ["os.system", "not allowed"]),
    "warm-up too long": (["scheduler.warmup_steps=9"], ["warmup_steps=9", "6 training steps"]),
    "accumulation": (["+trainer.accumulate_grad_batches=2"], ["micro_batch_size"]),
    "compile": (["trainer.compile=fast"], ["trainer.compile is 'fast'", "reduce-overhead"]),
    "checkpointing": (["trainer.activation_checkpointing=some"], ["'some'", "full, selective"]),
    "8 bits without a GPU": (["trainer.fp8=true"], ["trainer.fp8"]),
    "nothing to resume": (["resume=/nowhere/run"], ["resume=/nowhere/run", "there is no such path"]),
    "best without evaluation": (["callbacks.best.monitor=x"], ["evaluate_every_n_steps"]),
    "validation data missing": (["data.val=/nowhere/val.tar"], ["/nowhere/val.tar"]),
    "workers": (["data.num_workers=-1"], ["num_workers is -1"]),
    "padding that is read": (
        ["+model.encoders.text.pooling=last", "+model.encoders.text.causal=false"],
        ["tokenizer.pad=context_length"],
    ),
    "resuming a file that is no checkpoint": ([f"resume={__file__}"], ["no run and no checkpoint"]),
    "timm name": (["model.encoders.image.name=vit_tinny_patch16_224"], ["vit_tinny", "vit_tiny_patch16_224"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_that_says_what_to_change(case, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides, words = WRONG[case]
    assert run(*tiny, *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("mmpretrain: error: "), error
    for word in words:
        assert word in error[0]
    assert list(tmp_path.iterdir()) == []  # nothing written


def test_missing_data_train_is_named(capsys):
    assert run("experiment=image_text_clip", "trainer=cpu") == 2
    assert "data.train" in capsys.readouterr().err


def test_a_taken_run_folder_and_a_checkpoint_of_another_model_are_refused(tiny, tmp_path, capsys):
    folder = tmp_path / "r"
    common = [
        "evaluators=none",
        f"run_dir={folder}",
        "callbacks.checkpoint_every_n_steps=2",
        "trainer.max_steps=2",
    ]
    assert run(*tiny, *common) == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert run(*tiny, *common) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run(*tiny, *common, "resume=auto") == 2
    assert "nothing is left to do" in capsys.readouterr().err
    assert run(*tiny, *common, "resume=auto", "model.encoders.text.depth=2", "trainer.max_steps=4") == 2
    error = capsys.readouterr().err
    assert "blocks.1" in error and "another model" in error
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "config.yaml"}
    assert after == {p: b for p, b in before.items() if p.name != "config.yaml"}


def test_an_unreadable_picture_stops_with_its_name(tiny, tmp_path, capsys):
    import webdataset

    (tmp_path / "bad").mkdir()
    with webdataset.TarWriter(str(tmp_path / "bad" / "00000.tar")) as writer:
        for i in range(8):
            writer.write({"__key__": f"broken{i}", "png": b"\x89PNG not really", "txt": "a picture"})
    assert run(*tiny, f"data.train={tmp_path / 'bad'}", f"run_dir={tmp_path / 'r'}") == 2
    assert "broken0" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_pickles_in_a_shard_are_never_opened(tiny, shards, tmp_path):
    """webdataset's default decoders would run them; the sample itself is used as if they were not there."""
    import pickle

    import webdataset

    from mmpretrain.data.shards import iter_shard

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "poisoned").mkdir()
    with webdataset.TarWriter(str(tmp_path / "poisoned" / "00000.tar")) as writer:
        for sample in iter_shard(shards / "00000.tar"):
            payload = pickle.dumps(Payload())
            raw = {k: v for k, v in sample.items() if k in ("__key__", "png", "txt")}
            writer.write({**raw, "pyd": payload, "pkl": payload, "pickle": payload, "pth": payload, "pt": payload})
    common = [f"data.train={tmp_path / 'poisoned'}", "evaluators=none", "trainer.max_steps=2"]
    assert run(*tiny, *common, f"run_dir={tmp_path / 'r'}") == 0
    assert not (tmp_path / "executed").exists()


def test_an_empty_data_set_is_refused(tiny, tmp_path, capsys):
    import webdataset

    webdataset.TarWriter(str(tmp_path / "00000.tar")).close()
    assert run(*tiny, f"data.train={tmp_path}", f"run_dir={tmp_path / 'r'}") == 2
    assert "no sample" in capsys.readouterr().err


def test_long_captions_are_cut_with_their_end_and_counted(tiny, tmp_path):
    cut = ["tokenizer.context_length=6", "trainer.max_steps=2", "evaluators=none"]
    assert run(*tiny, *cut, f"run_dir={tmp_path / 'r'}") == 0
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["train/truncated_captions"] >= 16


def test_ctrl_c_saves_and_says_how_to_go_on(tiny, tmp_path):
    slow = [*tiny, "trainer.max_steps=100000", "evaluators=none", f"run_dir={tmp_path / 'r'}"]
    process = subprocess.Popen([sys.executable, "-m", "mmpretrain", "train", *slow], stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "r" / "metrics.csv").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == EXIT_PREEMPTED and "resume=auto" in error and "Traceback" not in error
    assert (tmp_path / "r" / "checkpoints" / "latest" / "manifest.json").is_file()


@pytest.mark.slow
def test_fully_sharded_training_saves_the_same_model(tiny, tmp_path):
    common = [*tiny, "trainer=fsdp", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.max_steps=4"]
    for devices in (1, 2):
        where = [f"trainer.devices={devices}", f"run_dir={tmp_path / str(devices)}"]
        run_on_ranks(devices, [*common, *where], tmp_path / f"log_{devices}")
    one, two = rows(tmp_path / "1"), rows(tmp_path / "2")
    for step in one:
        assert two[step]["loss/total"] == pytest.approx(one[step]["loss/total"], rel=2e-5)
    for name, tensor in weights(tmp_path / "1").items():
        torch.testing.assert_close(weights(tmp_path / "2")[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


def test_bad_pictures_are_counted_replaced_and_limited(tiny, shards, tmp_path, capfd):
    import webdataset

    from mmpretrain.data.shards import iter_shard

    (tmp_path / "some").mkdir()
    with webdataset.TarWriter(str(tmp_path / "some" / "00000.tar")) as writer:
        for i, sample in enumerate(iter_shard(shards / "00000.tar")):
            writer.write({**sample, "png": sample["png"] if i < 12 else b"\x89PNG not really"})
    common = [f"data.train={tmp_path / 'some'}", "evaluators=none", "data.num_workers=1", "trainer.max_steps=4"]
    assert run(*tiny, *common, f"run_dir={tmp_path / 'r'}") == EXIT_STOPPED
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mmpretrain: error")]
    assert len(lines) == 1 and "max_bad_fraction" in lines[0] and "undecodable" in lines[0]
    assert run(*tiny, *common, "data.max_bad_fraction=0.5", f"run_dir={tmp_path / 's'}") == 0
    events = [json.loads(line) for line in (tmp_path / "s" / "data_events.jsonl").read_text().splitlines()]
    assert {event["cause"] for event in events} == {"undecodable"} and len(events) == 4
    assert {event["shard"].endswith("00000.tar") for event in events} == {True}
    metrics = json.loads((tmp_path / "s" / "metrics.json").read_text())
    assert metrics["data/lost/undecodable"] == 4 and metrics["data/bad_fraction"] == pytest.approx(0.25)


def test_a_misspelt_metric_to_keep_the_best_by_is_named(tiny, tmp_path, capsys):
    best = ["callbacks.best.monitor=val/retrieval/text_to_image/recal@1", "callbacks.evaluate_every_n_steps=2"]
    assert run(*tiny, *best, f"run_dir={tmp_path / 'r'}") == 2
    assert "text_to_image/recall@1" in capsys.readouterr().err


def test_resume_auto_with_a_run_dir_starts_where_there_is_nothing(tiny, tmp_path):
    once = ["evaluators=none", "resume=auto", f"run_dir={tmp_path / 'r'}", "trainer.max_steps=2"]
    assert run(*tiny, *once) == 0
    assert (tmp_path / "r" / "checkpoints" / "latest" / "manifest.json").is_file()
    assert run(*tiny, *once[:-1], "trainer.max_steps=4") == 0
    assert list(rows(tmp_path / "r")) == [1, 2, 3, 4]


@pytest.mark.slow
def test_going_on_in_another_order_is_refused_unless_asked_for(tiny, shards, tmp_path, capsys):
    folder = tmp_path / "r"
    common = ["evaluators=none", f"run_dir={folder}", "resume=auto"]
    assert run(*tiny, *common, "trainer.max_steps=2") == 0
    config = (folder / "config.yaml").read_bytes()
    for change, words in (("seed=5", "seed was 0 and is 5"), ("data.global_batch_size=16", "was 8 and is 16")):
        assert run(*tiny, *common, "trainer.max_steps=4", change) == 2
        assert words in capsys.readouterr().err
    assert (folder / "config.yaml").read_bytes() == config  # a refused command leaves the run as it was
    assert run(*tiny, *common, "trainer.max_steps=4", "seed=5", "allow_new_order=true") == 0


@pytest.mark.slow
def test_a_run_that_was_lengthened_and_killed_before_its_end_is_finished(tiny, tmp_path):
    """The metrics of its first part are there, but they are not those of its last checkpoint."""
    folder = tmp_path / "r"
    common = ["evaluators=none", f"run_dir={folder}", "resume=auto"]
    assert run(*tiny, *common, "trainer.max_steps=2") == 0
    script = (
        "import os, sys\n"
        "import mmpretrain.train\n"
        "from mmpretrain.cli import main\n"
        "mmpretrain.train.finish = lambda *rest: os.kill(os.getpid(), 9)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    assert launch("-c", script, "train", *tiny, *common, "trainer.max_steps=4").returncode == -signal.SIGKILL
    assert json.loads((folder / "metrics.json").read_text())["train/steps"] == 2
    assert run(*tiny, *common, "trainer.max_steps=4") == 0
    assert json.loads((folder / "metrics.json").read_text())["train/steps"] == 4
    assert run(*tiny, *common, "trainer.max_steps=4") == 2  # now there is nothing left to do
