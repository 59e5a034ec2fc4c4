"""Benchmarks: each first checks that both sides compute the same, then alternates them in one run."""
