"""Data: from shards to batches."""
