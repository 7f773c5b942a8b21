"""Fixtures: the notebook's definitions (`nb`), a small configuration, and folders of small images."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
import loader  # noqa: E402


@pytest.fixture(scope="session")
def nb():
    torch.set_num_threads(2)
    return loader.load()


@pytest.fixture
def tiny(nb, tmp_path):
    """A small network in fp32 on the CPU, with everything it writes in a folder of the test's own."""
    return nb.make_config(
        "smoke", device="cpu", precision="fp32", download=False, run_dir=str(tmp_path / "runs"),
        data_dir=str(tmp_path / "data"), dropout=0.1,
    )  # fmt: skip


def paint(folder: Path, classes=("cup", "key", "shoe"), counts=(24, 8), size=(16, 16), seed=0) -> Path:
    """Write folder/{train,test}/<class>/N.png: blobs whose colour tells the class."""
    rng = np.random.default_rng(seed)
    for part, count in zip(("train", "test"), counts):
        for k, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 90, (*size, 3))
                pixels[..., k % 3] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{n:03}.png")
    return folder


@pytest.fixture
def own_images(tmp_path):
    return paint(tmp_path / "mine")
