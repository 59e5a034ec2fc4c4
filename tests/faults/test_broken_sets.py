"""Each broken set of shards ends in one clear sentence that names the shard, in under 10 s."""

from pathlib import Path

import pytest

from tests.faults.broken_sets import CASES, faults, run


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four workers, perhaps on two cores
@pytest.mark.parametrize("name", CASES)
def test_a_broken_set_ends_in_one_clear_sentence(name: str, tmp_path: Path) -> None:
    outcome = run(CASES[name], tmp_path)
    assert faults(CASES[name], outcome, tmp_path) == [], outcome
