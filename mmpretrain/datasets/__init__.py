"""Data sets that build their own shards; each module has a `build()` and its zero-shot tasks."""
