"""The GPU set on the CPU with tiny sizes: every path of it runs; and its references and guards."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

from benchmarks import _gpu, _gpu_inputs, gpu, gpu_contrastive


def smoke(monkeypatch, capsys, tmp_path, *options: str) -> dict:
    command = ["gpu", "--device", "cpu", "--smoke", "--json", "--results", str(tmp_path), *options]
    monkeypatch.setattr(sys, "argv", command)
    threads = torch.get_num_threads()
    try:
        gpu.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(capsys.readouterr().out)


def test_steps_and_shards_are_measured(monkeypatch, capsys, tmp_path):
    found = smoke(monkeypatch, capsys, tmp_path, "--only", "train_step", "end_to_end", "--models", "tiny_vocab")
    names = [report["benchmark"] for report in found["benchmarks"]]
    assert names == ["GPU train_step tiny_vocab", "GPU end_to_end"]
    assert found["skipped"] == []
    for report in found["benchmarks"]:
        assert all(row["ratio"] > 0 for row in report["rows"])
    step = found["benchmarks"][0]
    peers = {row["peer_name"] for row in step["rows"]}
    assert peers == {"open_clip eager", "open_clip compiled"}
    assert any(note.startswith("MFU of tiny_vocab") for note in step["notes"])
    (written,) = tmp_path.glob("*.md")
    assert all(f"### {name}" in written.read_text() for name in names)


def test_both_sides_of_coca_are_compared():
    found = _gpu_inputs.compare("tiny_coca", 4, "cpu")
    assert len(found) == 4 and all(apart <= allowed for apart, allowed in found.values())


def test_losses_are_measured(monkeypatch, capsys, tmp_path):
    found = smoke(monkeypatch, capsys, tmp_path, "--only", "contrastive_memory")
    assert [report["benchmark"] for report in found["benchmarks"]] == [
        "GPU contrastive_memory clip",
        "GPU contrastive_memory sigmoid",
    ]
    for report in found["benchmarks"]:
        assert {row["peer_name"] for row in report["rows"]} == {"open_clip"}
        assert all(error < 0.1 for error in report["checked"].values())


@pytest.mark.parametrize(("kind", "plain"), [("clip", "open_clip_loss"), ("sigmoid", "open_clip_sigmoid")])
def test_the_reference_in_tiles_is_the_plain_loss(kind, plain):
    a, b = (x.double() for x in gpu_contrastive.vectors(11, 8, torch.device("cpu")))
    a, b, scale = a.requires_grad_(), b.requires_grad_(), torch.tensor(5.0).double().log().requires_grad_()
    loss = getattr(gpu_contrastive, plain)(a, b, scale)
    expected = torch.autograd.grad(loss, (a, b, scale))
    value, *found = gpu_contrastive.reference(a.detach(), b.detach(), 5.0, kind, 4, torch.float64)
    assert value == pytest.approx(loss.item(), abs=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 if kind == "sigmoid" else 1e-12)


def test_sizes_of_real_models_have_texts_of_16_ids_on_average():
    config = {"text_cfg": {"context_length": 76}}
    for lengths in _gpu_inputs.text_lengths(config, 1024, 4):
        assert len(lengths) == 1024 and max(lengths) <= 76
        assert sum(lengths) / 1024 == pytest.approx(16, rel=0.1)


def test_texts_have_no_id_0_but_as_padding():
    ids, mask = _gpu_inputs.texts([3, 7, 5], 8, 64, torch.Generator().manual_seed(0))
    assert (ids == 0).equal(~mask)
    assert (ids.argmax(1) + 1).tolist() == [3, 7, 5] and (ids[:, 0] == 62).all()


def test_a_side_answers_from_its_own_process_and_names_what_fails():
    side = _gpu.Side(answering)
    try:
        side.send(number=4)
        assert side.receive(120) == 2
        side.send(number=-1)
        with pytest.raises(SystemExit, match=r"math domain error|nonnegative"):
            side.receive(60)
        with pytest.raises(_gpu.OutOfTime):
            side.receive(0)
    finally:
        side.close()
    assert not side.process.is_alive()


def answering() -> _gpu.Handler:
    return lambda request: math.sqrt(request["number"])


def test_missing_packages_are_named_at_once():
    assert _gpu.missing(["torch", "no_such_module", "inf_cl_absent"]) == ["no_such_module", "inf_cl_absent"]


def test_a_part_that_fails_is_named_and_the_rest_goes_on(tmp_path):
    results = gpu.Results(tmp_path)

    def failing():
        raise RuntimeError("no such kernel")

    assert not results.add("first", failing)
    assert results.failed and "first: not measured: no such kernel" in results.path.read_text()
