"""Where images come from, what a user reads when a source is broken, and batches."""

import http.client
import http.server
import os
import re
import shutil
import tarfile
import threading
import time
import urllib.request
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import images_of, make_cifar_batches, paint
from PIL import Image
from torchvision.datasets.utils import calculate_md5 as md5


# ------------------------------------------------------------------------------------- folders of one's own
@pytest.mark.parametrize("place", ["mine", "mine/cifar10"])
def test_own_images_become_an_image_set_without_what_starts_with_a_dot(nb, tiny, tmp_path, place):
    paint(tmp_path / place)
    (tmp_path / place / "train" / ".ipynb_checkpoints").mkdir()
    (tmp_path / place / "train" / "cup" / "._000.png").write_bytes(b"what macOS leaves behind")
    config = nb.replace(tiny, data_dir=str(tmp_path / "mine"))
    train = nb.load_images(config, True)
    assert train.images.dtype == torch.uint8 and train.images.shape == (72, 3, 16, 16)
    assert train.class_names == ("cup", "key", "shoe") and "own images" in train.source
    assert len(nb.load_images(config, False)) == 24
    for k in range(3):  # the colour that was painted tells the class: labels belong to their images
        assert (train.images[train.labels == k].float().mean((0, 2, 3)).argmax() == k).all()


def test_a_folder_that_is_all_of_cifar_is_recognised_and_its_jpeg_copies_are_told(nb, tiny, tmp_path):
    folder = paint(tmp_path / "data" / "cifar10", classes=nb.CLASSES, counts=(1, 1), size=(4, 4))
    for png in folder.glob("test/*/000.png"):
        for n in range(1, 1000):
            os.link(png, png.with_name(f"{n:03}.{'png' if n < 900 else 'jpg'}"))
    images = nb.load_images(tiny, False)
    assert images.source == "CIFAR-10 (10% of the test images JPEG copies)" and len(images) == 10_000


def test_what_is_transparent_becomes_white_and_pictures_stand_upright(nb, tmp_path):
    glass = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    glass.putpixel((1, 2), (0, 0, 255, 255))
    glass.save(tmp_path / "glass.png")
    pixels = nb.read_picture(tmp_path / "glass.png")
    assert pixels[0, 0].tolist() == [255, 255, 255] and pixels[2, 1].tolist() == [0, 0, 255]
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways: to be turned clockwise by 90 degrees
    lying = Image.new("L", (8, 16))
    lying.paste(255, (0, 0, 8, 8))
    lying.save(tmp_path / "lying.png", exif=exif)
    upright = nb.read_picture(tmp_path / "lying.png")
    assert upright.shape == (8, 16, 3) and upright[:, 8:].min() == 255 and upright[:, :8].max() == 0


DEEP = Image.fromarray(np.full((16, 16), 30_000, np.uint16))
BROKEN = [  # what is done to the folder, where, and what a user reads
    (lambda path: os.truncate(path, 200), "train/key/003.png", "003.png is not a readable picture.*replace or delete"),
    (lambda path: (path.unlink(), path.symlink_to("no")), "test/cup/000.png", "000.png is not a readable picture"),
    (DEEP.save, "train/cup/000.png", "000.png is not a readable picture .more than 8 bits"),
    (Image.new("RGB", (20, 16)).save, "train/cup/001.png", r"001.png is \(16, 20\) pixels, .*000.png \(16, 16\)"),
    (shutil.rmtree, "train/key", "class 'key' must have images in both"),
    (lambda path: path.rename(path.with_name("mug")), "test/cup", "class 'cup' must have images in both"),
    (shutil.rmtree, "test", "test must hold <class>/"),
    (lambda path: (shutil.rmtree(path), path.write_text("a file")), "test", "test must hold <class>/"),
    (lambda path: (shutil.rmtree(path), (path / "inner").mkdir(parents=True)), "", "photos holds inner, not what is"),
    (shutil.rmtree, "", "photos does not exist"),
    (lambda path: (shutil.rmtree(path), path.write_text("a file")), "", "is a file: name the folder"),
]


@pytest.mark.parametrize(("spoil", "where", "message"), BROKEN)
def test_a_broken_folder_is_named_in_one_sentence_and_nothing_is_fetched(nb, tiny, tmp_path, spoil, where, message):
    folder = paint(tmp_path / "photos")
    spoil(folder / where)
    config = nb.replace(tiny, data_dir=str(folder), download=True)
    with pytest.raises(ValueError, match=message) as caught:
        for train in (True, False):
            nb.load_images(config, train)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ the official archive
@pytest.fixture
def archive(nb, tiny, tmp_path, monkeypatch):
    """A small archive in CIFAR-10's own format, with the checksums of torchvision and the notebook set to it."""
    folder = tmp_path / "make" / "cifar-10-batches-py"
    names = make_cifar_batches(folder, nb.CLASSES)
    path = tmp_path / "make" / nb.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(nb, "MD5", md5(path))
    monkeypatch.setattr(nb.CIFAR10, "tgz_md5", md5(path))
    monkeypatch.setattr(nb.CIFAR10, "train_list", [[n, md5(folder / n)] for n in names[:5]])
    monkeypatch.setattr(nb.CIFAR10, "test_list", [[names[5], md5(folder / names[5])]])
    monkeypatch.setattr(nb.CIFAR10, "meta", meta)
    return path


def test_the_archive_comes_before_a_folder_and_is_unpacked_once(nb, tiny, archive):
    paint(Path(tiny.data_dir) / "cifar10")
    path = Path(shutil.copy(archive, tiny.data_dir))
    images = nb.load_images(tiny, True)
    assert len(images) == 100 and images.source == "CIFAR-10, official archive"
    assert images.class_names == tuple(nb.CLASSES) and images.images.shape[1:] == (3, 32, 32)
    path.unlink()
    assert len(nb.load_images(tiny, False)) == 20


def test_a_damaged_archive_is_named_or_mended(nb, tiny, archive):
    path = Path(shutil.copy(archive, tiny.data_dir))
    os.truncate(path, path.stat().st_size - 500)
    unpacked = path.parent / "cifar-10-batches-py"
    with pytest.raises(ValueError, match="tar.gz is incomplete or damaged: delete it"):
        nb.load_images(tiny, True)
    assert not unpacked.exists()
    shutil.copy(archive, path)
    for name in ("data_batch_2", "batches.meta"):
        nb.load_images(tiny, True)
        (unpacked / name).write_bytes(b"")
    path.unlink()
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged: delete it"):
        nb.load_images(tiny, True)


# ---------------------------------------------------------------------------------------------- download
@pytest.fixture
def host(archive):
    """A server on loopback that answers /whole, /steady, /wrong, /half, /slow, /silent and /dead, else with 404."""
    data = archive.read_bytes()
    stop = threading.Event()
    known = dict(whole=[data], wrong=[b"x" * len(data)], half=[data[: len(data) // 2]], slow=[b"x"] * 100, silent=[])
    known["steady"] = [data[i : i + 50_000] for i in range(0, len(data), 50_000)]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.split("/")[1]
            stop.wait(30 * (kind == "dead"))
            self.send_response(200 if kind in known else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            for piece in known.get(kind, []):
                self.wfile.write(piece)
                stop.wait(0.1 * (kind in ("steady", "slow")))
            stop.wait(30 * (kind == "silent"))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    stop.set()
    server.shutdown()
    server.server_close()


def test_a_whole_download_is_used(nb, tiny, host, monkeypatch):
    monkeypatch.setattr(nb, "MIRRORS", (f"{host}/missing/", f"{host}/whole/"))
    (Path(tiny.data_dir) / f"{nb.ARCHIVE}.123.part").write_text("left by a kernel that was killed")
    images = nb.load_images(nb.replace(tiny, download=True), True)
    assert images.source == "CIFAR-10, official archive" and len(images) == 100


FAILURES = dict(wrong="wrong MD5", half="wrong MD5", slow="kB/s", silent="timed out", dead="timed out", no="404")


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failing_host_is_left_soon_and_leaves_nothing(nb, tmp_path, host, kind):
    target = tmp_path / "to" / nb.ARCHIVE
    start = time.monotonic()
    with pytest.raises((OSError, ValueError, http.client.HTTPException), match=FAILURES[kind]):
        nb.fetch(f"{host}/{kind}", target, nb.MD5, patience=1.0)
    assert time.monotonic() - start < 4 and not list(target.parent.glob("*"))


@pytest.mark.parametrize("disable", [False, True])  # True is what TQDM_DISABLE=1 does
def test_a_long_download_is_not_given_up_with_a_progress_bar_or_without(nb, tmp_path, host, monkeypatch, disable):
    monkeypatch.setattr(nb, "tqdm", partial(nb.tqdm, disable=disable))
    nb.fetch(f"{host}/steady", tmp_path / "it.gz", nb.MD5, patience=0.2, least=1000)


def why_stand_in(nb, config, capsys) -> str:
    """The one line that says that stand-in images are used, and why."""
    images = nb.load_images(nb.replace(config, download=True), True)
    assert images.source == "stand-in images, not CIFAR-10" and images.class_names == tuple(nb.CLASSES)
    printed = re.sub(r".*\r", "", capsys.readouterr().out)
    (said,) = [line for line in printed.splitlines() if "using stand-in images, not CIFAR-10" in line]
    return said


def test_dead_hosts_cost_their_patience_and_one_line(nb, tiny, host, monkeypatch, capsys):
    monkeypatch.setattr(nb, "MIRRORS", (f"{host}/dead/", "http://127.0.0.1:9/"))  # nothing listens on port 9
    monkeypatch.setattr(nb.fetch, "__defaults__", (1.0, 50e3))
    start = time.monotonic()
    said = why_stand_in(nb, tiny, capsys)
    assert said.count("127.0.0.1") == 2 and "timed out" in said and "refused" in said
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("garbage", ["%%%", "http://[::", "http://127.0.0.1:port", "x y://\x7f"])
def test_garbage_in_a_proxy_variable_costs_one_line(nb, tiny, monkeypatch, capsys, garbage):
    monkeypatch.setattr(nb, "MIRRORS", ("http://mirror.invalid/",))
    monkeypatch.setenv("http_proxy", garbage)
    urllib.request.install_opener(None)  # the old one keeps the proxies of its first use
    assert "mirror.invalid" in why_stand_in(nb, tiny, capsys)
    urllib.request.install_opener(None)


def test_stand_in_parts_do_not_overlap(nb, tmp_path):
    train = nb.from_standin(True)
    test = nb.from_standin(False)
    seen = {image.numpy().tobytes() for image in train.images}
    assert len(train) >= 300 and len(test) >= 60 and not any(x.numpy().tobytes() in seen for x in test.images)
    assert (torch.bincount(train.labels) == len(train) // 10).all()
    with pytest.raises(ValueError, match="put CIFAR-10 into data_dir"):
        nb.from_standin(True, tmp_path / "standin.png")


# ----------------------------------------------------------------------------------------------- batches
def test_batches_visit_every_image_once_an_epoch_and_go_on_anywhere(nb):
    images = images_of(nb, 30, classes=30)
    labels = torch.cat([nb.batch_at(step, images, 7, seed=1)[1] for step in range(13)]).tolist()
    assert sorted(labels[:30]) == sorted(labels[30:60]) == list(range(30)) and labels[:30] != labels[30:60]
    assert nb.batch_at(9, images, 7, seed=1)[1].tolist() == labels[63:70]
    assert sorted(nb.batch_at(0, images, 90, seed=1)[1].tolist()) == sorted(3 * list(range(30)))  # three epochs in one


def test_batches_flip_about_half_from_left_to_right_or_none(nb):
    images = images_of(nb, 400, classes=400)
    x_0, y = nb.batch_at(0, images, 400, seed=0)
    unit = nb.to_unit(images.images[y])
    mirrored = (x_0 == unit.flip(3)).flatten(1).all(1)
    assert 150 < mirrored.sum() < 250 and torch.equal(x_0[~mirrored], unit[~mirrored])
    assert x_0.dtype == torch.float32 and x_0.min() == -1 and x_0.max() == 1
    assert torch.equal(nb.to_uint8(x_0[~mirrored]), images.images[y[~mirrored]])  # pixels travel there and back
    plain, y = nb.batch_at(0, images, 400, seed=0, flip=False)
    assert torch.equal(plain, nb.to_unit(images.images[y]))


def test_a_subset_is_fixed_by_its_seed_and_first_of_each_passes_over_a_class_without_images(nb):
    images = images_of(nb, 30, classes=30)
    a, b, c = (images.subset(10, seed).labels.tolist() for seed in (1, 1, 2))
    assert a == b != c and len(set(a)) == 10 and len(images.subset(0)) == len(images.subset(99)) == 30
    some = nb.replace(images.subset(5), labels=torch.tensor([2, 0, 2, 0, 0]))
    assert nb.first_of_each(some, 2).tolist() == [1, 3, 0, 2]


def test_of_a_folder_only_as_many_files_are_decoded_as_are_used(nb, tiny, tmp_path, monkeypatch):
    config = nb.replace(tiny, data_dir=str(paint(tmp_path)), train_images=20)
    read = []
    original = nb.read_picture
    monkeypatch.setattr(nb, "read_picture", lambda file: read.append(file) or original(file))
    images = nb.load_images(config, True)
    assert len(images) == len(read) == 20 and len({*images.labels.tolist()}) > 1
    whole = {image.numpy().tobytes() for image in nb.load_images(nb.replace(config, train_images=0), True).images}
    assert len({image.numpy().tobytes() for image in images.images} & whole) == 20
