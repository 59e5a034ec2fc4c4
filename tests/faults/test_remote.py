"""Shards over a bad connection, in short: `python -m tests.faults.remote` is the long form, with an S3 store too."""

from tests.faults.remote import LIMIT, trial


def test_a_bad_connection() -> None:
    found = trial(seed=7, s3=False, seconds=3.0)
    assert found.wrong == []
    assert found.most <= LIMIT
