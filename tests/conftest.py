"""Fixtures: the notebook's definitions (`nb`), a small configuration, and images in memory and in folders."""

import pickle
from pathlib import Path

import loader
import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def nb():
    torch.set_num_threads(min(2, torch.get_num_threads()))
    return loader.load()


@pytest.fixture
def tiny(nb, tmp_path):
    """A small network for 8×8 images in fp32 on the CPU, with everything it writes in a folder of the test's own."""
    (tmp_path / "data").mkdir()
    own = dict(run_dir=str(tmp_path / "runs"), data_dir=str(tmp_path / "data"), train_images=0, test_images=0)
    return nb.make_config("smoke", device="cpu", image_shape=(3, 8, 8), widths=(16,), download=False, **own)


def images_of(nb, n=40, shape=(3, 8, 8), classes=10, seed=0):
    """`n` images of random pixels, labelled 0, 1, 2 …"""
    dice = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, *shape), generator=dice, dtype=torch.uint8)
    return nb.ImageSet(pixels, torch.arange(n) % classes, tuple(str(k) for k in range(classes)), "random")


def paint(folder: Path, classes=("cup", "key", "shoe"), counts=(24, 8), size=(16, 16)) -> Path:
    """Write folder/{train,test}/<class>/N.png: blobs whose colour tells the class. `size` is height and width."""
    dice = np.random.default_rng(0)
    for part, count in zip(("train", "test"), counts):
        for k, name in enumerate(classes):
            (folder / part / name).mkdir(parents=True)
            for n in range(count):
                pixels = dice.integers(0, 90, (*size, 3))
                pixels[..., k % 3] += 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{n:03}.png")
    return folder


def make_cifar_batches(folder: Path, classes: list) -> list:
    """Write 120 images in CIFAR-10's own format into `folder`; the names of the files with images."""
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": list(range(10)) * 2}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    return names
