"""`metrics.csv`: appended, rewritten where it must be, sound after kills and full disks."""

from __future__ import annotations

import csv
import resource
import shutil
from pathlib import Path

import pytest

from mmpretrain.training.csv_logger import MetricsCsv

Capture = pytest.CaptureFixture[str]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def log(logger: MetricsCsv, first: int, last: int) -> None:
    """Log steps as training does: a loss at each, a score too at every fourth."""
    for step in range(first, last + 1):
        logger.log_metrics({"loss": 1 / step, "lr": 0.1}, step)
        if step % 4 == 0:
            logger.log_metrics({"val/score": step / 7}, step)


def test_a_new_step_is_one_more_line(tmp_path: Path) -> None:
    logger, path = MetricsCsv(tmp_path), tmp_path / "metrics.csv"
    log(logger, 1, 4)  # all columns are known
    before, file = path.read_bytes(), path.stat().st_ino
    log(logger, 5, 7)
    assert path.read_bytes().startswith(before) and path.stat().st_ino == file  # the same file, not a new one
    log(logger, 8, 8)
    assert path.stat().st_ino != file  # further values in the last row
    assert [row["step"] for row in table(tmp_path)] == [str(step) for step in range(1, 9)]
    assert table(tmp_path)[4] == {"step": "5", "loss": "0.2", "lr": "0.1", "val/score": ""}
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("resumed", range(10))
@pytest.mark.parametrize("cut", [0, 1, 3, 9])
def test_a_resumed_run_writes_what_an_unkilled_one_does(tmp_path: Path, resumed: int, cut: int) -> None:
    """Killed at step 10, the last line perhaps torn, and gone on from a checkpoint at `resumed`."""
    for name in "ab":
        (tmp_path / name).mkdir()
    log(MetricsCsv(tmp_path / "a"), 1, 12)
    log(MetricsCsv(tmp_path / "b"), 1, 10)
    killed = tmp_path / "b" / "metrics.csv"
    killed.write_bytes(killed.read_bytes()[: -cut or None])
    log(MetricsCsv(tmp_path / "b"), resumed + 1, 12)
    assert killed.read_bytes() == (tmp_path / "a" / "metrics.csv").read_bytes()


@pytest.mark.parametrize(
    "tail", [b"3,0", b"3,0.5,0.1", b"3,0.5\r\n", b"3,0.5,0.1,7\r\n", b"3,oh,0.1\r\n", b"\0" * 300_000, b'3,"\xff\xfe']
)
def test_a_torn_line_is_dropped(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"step,loss,lr\r\n1,1.0,0.1\r\n2,0.5,0.1\r\n" + tail)
    logger = MetricsCsv(tmp_path)
    assert logger.rows == {1: {"loss": 1.0, "lr": 0.1}, 2: {"loss": 0.5, "lr": 0.1}}
    logger.log_metrics({"loss": 0.25}, 3)
    assert path.read_bytes() == b"step,loss,lr\r\n1,1.0,0.1\r\n2,0.5,0.1\r\n3,0.25,\r\n"


@pytest.mark.parametrize("content", [b"", b"st", b"\n", b"step,loss\r\n", b"\xff\0\n1,2\n"])
def test_a_file_without_rows_is_begun_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    logger = MetricsCsv(tmp_path)
    logger.log_metrics({}, 1)
    logger.log_metrics({"loss": 2}, 2)
    assert [(row["step"], row["loss"]) for row in table(tmp_path)] == [("1", ""), ("2", "2.0")]


def test_a_folder_that_is_gone_for_a_while_loses_no_row(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    logger = MetricsCsv(folder)
    log(logger, 1, 5)
    shutil.rmtree(folder)
    log(logger, 6, 8)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "metrics.csv cannot be written (No such file" in error
    folder.mkdir()
    log(logger, 9, 9)
    assert [row["step"] for row in table(folder)] == [str(step) for step in range(1, 10)]
    assert capsys.readouterr().err == ""


def test_a_line_that_does_not_fit_is_written_later(tmp_path: Path, capsys: Capture) -> None:
    logger, path = MetricsCsv(tmp_path), tmp_path / "metrics.csv"
    log(logger, 1, 5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 3, hard))  # as a disk with three bytes left
    try:
        log(logger, 6, 7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert path.read_bytes().endswith(b"\n6,0") and [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]
    assert list(MetricsCsv(tmp_path).rows) == [1, 2, 3, 4, 5]
    log(logger, 8, 8)
    assert [row["step"] for row in table(tmp_path)] == [str(step) for step in range(1, 9)]
