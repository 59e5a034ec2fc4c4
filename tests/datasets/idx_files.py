"""scikit-learn's digits as the four gzipped IDX files of Fashion-MNIST."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx_folder(folder: Path, packed: bool = True) -> Path:
    """Write pictures of 28 x 28 pixels, the first 1200 to train on and 597 to test."""
    data = load_digits()
    pictures = np.kron(data.images * 15, np.ones((1, 4, 4)))[:, 2:30, 2:30]
    folder.mkdir(parents=True)
    for first, part in (("train", slice(0, 1200)), ("t10k", slice(1200, None))):
        for what, array in (("images-idx3", pictures[part]), ("labels-idx1", data.target[part])):
            content = idx(array)
            name = f"{first}-{what}-ubyte" + (".gz" if packed else "")
            (folder / name).write_bytes(gzip.compress(content, 1) if packed else content)
    return folder
