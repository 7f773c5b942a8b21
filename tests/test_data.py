"""Where images come from, and what a user reads when one of the sources is broken."""

import http.server
import inspect
import pickle
import re
import socket
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import paint
from PIL import Image


@pytest.mark.parametrize("place", ["mine", "mine/cifar10"])
def test_own_images_become_an_image_set(nb, tiny, tmp_path, place):
    paint(tmp_path / place)
    config = nb.replace(tiny, data_dir=str(tmp_path / "mine"), train_images=0)
    train, test = nb.load_images(config, True), nb.load_images(config, False)
    assert train.images.dtype == torch.uint8 and train.images.shape == (72, 3, 16, 16) and len(test) == 24
    assert train.class_names == ("cup", "key", "shoe") and "own images" in train.source
    for k in range(3):  # the colour that was painted tells the class: labels belong to their images
        assert (train.images[train.labels == k].float().mean((0, 2, 3)).argmax() == k).all()


def test_decoded_images_are_cached_until_a_file_changes(nb, tiny, own_images, monkeypatch):
    config = nb.replace(tiny, data_dir=str(own_images))
    first = nb.load_images(config, True)
    calls, original = [], nb.read_images
    monkeypatch.setattr(nb, "read_images", lambda files: calls.append(1) or original(files))
    assert torch.equal(nb.load_images(config, True).images, first.images) and not calls
    Image.new("RGB", (16, 16)).save(own_images / "train" / "cup" / "000.png")
    assert not torch.equal(nb.load_images(config, True).images, first.images) and calls
    (own_images / ".cache-train.safetensors").write_bytes(b"half a file")
    assert len(nb.load_images(config, True)) == len(first) and len(calls) == 2


def test_a_read_only_cache_only_costs_time(nb, tiny, own_images, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(nb, "write_whole", refuse)
    assert len(nb.load_images(nb.replace(tiny, data_dir=str(own_images), train_images=0), True)) == 72


def spoil_truncated(folder):
    file = folder / "train" / "key" / "003.png"
    file.write_bytes(file.read_bytes()[:200])
    return "003.png.*not a readable image.*replace or delete"


def spoil_size(folder):
    Image.new("RGB", (20, 16)).save(folder / "train" / "shoe" / "001.png")
    return "001.png is 20×16 pixels but .*000.png is 16×16"


def spoil_text(folder):
    (folder / "train" / "cup" / "000.png").write_text("not an image")
    return "000.png.*not a readable image"


def spoil_link(folder):
    (folder / "train" / "cup" / "000.png").unlink()
    (folder / "train" / "cup" / "000.png").symlink_to("nowhere.png")
    return "000.png is not a readable image.*replace or delete"


def spoil_empty(folder):
    for file in (folder / "train" / "key").iterdir():
        file.unlink()
    return "train must hold .*key"


def spoil_test(folder):
    (folder / "test").rename(folder / "hidden")
    return "test must hold <class>"


def spoil_file(folder):
    (folder / "test").rename(folder / "hidden")
    (folder / "test").write_text("a file")
    return "test must hold <class>"


def spoil_depth(folder):
    Image.fromarray(np.full((16, 16), 30000, np.uint16)).save(folder / "train" / "cup" / "000.png")
    return "000.png has more than 8 bits"


def spoil_classes(folder):
    (folder / "test" / "cup").rename(folder / "test" / "mug")
    return "class 'cup' must have images in both"


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_truncated,
        spoil_size,
        spoil_text,
        spoil_link,
        spoil_empty,
        spoil_test,
        spoil_file,
        spoil_depth,
        spoil_classes,
    ],
)
def test_a_broken_folder_is_named_in_one_sentence(nb, tiny, own_images, spoil):
    message = spoil(own_images)
    with pytest.raises(ValueError, match=message) as caught:
        nb.load_images(nb.replace(tiny, data_dir=str(own_images)), True)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------ the official archive


@pytest.fixture
def archive(nb, tmp_path, monkeypatch):
    """A small archive in CIFAR-10's own format, with torchvision's checksums set to it."""
    folder, rng = tmp_path / "make" / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    md5 = lambda path: nb.hashlib.md5(path.read_bytes()).hexdigest()  # noqa: E731
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        batch = {"data": rng.integers(0, 256, (20, 3072), dtype=np.uint8), "labels": list(range(10)) * 2}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": nb.CLASSES}))
    path = tmp_path / "make" / nb.ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    monkeypatch.setattr(nb, "MD5", md5(path))
    monkeypatch.setattr(nb.CIFAR10, "tgz_md5", md5(path))
    monkeypatch.setattr(nb.CIFAR10, "train_list", [[n, md5(folder / n)] for n in names[:5]])
    monkeypatch.setattr(nb.CIFAR10, "test_list", [[names[5], md5(folder / names[5])]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(nb.CIFAR10, "meta", meta)
    return path


def place(archive, config) -> Path:
    target = Path(config.data_dir) / archive.name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(archive.read_bytes())
    return target


def test_the_archive_comes_before_a_folder(nb, tiny, archive):
    place(archive, tiny)
    paint(Path(tiny.data_dir) / "cifar10")
    images = nb.load_images(nb.replace(tiny, train_images=0), True)
    assert len(images) == 100 and images.source == "CIFAR-10, official archive"
    assert images.class_names == tuple(nb.CLASSES) and images.images.shape[1:] == (3, 32, 32)
    assert len(nb.load_images(nb.replace(tiny, test_images=0), False)) == 20  # unpacked by now


def test_a_half_archive_is_not_taken_for_whole(nb, tiny, archive):
    path = place(archive, tiny)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="is incomplete or damaged: delete it"):
        nb.load_images(tiny, True)
    assert not (Path(tiny.data_dir) / "cifar-10-batches-py").exists()


def test_a_lost_list_of_classes_is_unpacked_again(nb, tiny, archive):
    meta = place(archive, tiny).parent / "cifar-10-batches-py" / "batches.meta"
    nb.load_images(tiny, True)
    for spoil in (meta.unlink, lambda: meta.write_bytes(b"")):
        spoil()
        assert nb.load_images(tiny, True).class_names == tuple(nb.CLASSES)


def test_jpeg_copies_of_all_of_cifar_are_told(nb, tiny, tmp_path, monkeypatch):
    """The folder is as large as CIFAR-10 only in name: reading 10,000 files would be another test."""
    folder = tmp_path / "data" / "cifar10"
    paint(folder, classes=tuple(sorted(nb.CLASSES)), counts=(2, 2))
    one = folder / "test" / "cat" / "000.png"
    Image.open(one).save(one.with_suffix(".jpg"))
    one.unlink()
    files = nb.ImageFolder(folder / "test").samples
    monkeypatch.setattr(nb.ImageFolder, "samples", files * 500, raising=False)
    monkeypatch.setattr(nb, "read_images", lambda files: torch.zeros(len(files), 3, 32, 32, dtype=torch.uint8))
    monkeypatch.setattr(nb.ImageFolder, "__init__", lambda self, *a, **k: setattr(self, "classes", sorted(nb.CLASSES)))
    assert nb.load_images(tiny, False).source == "CIFAR-10 (5% of the test images JPEG copies)"


def test_a_damaged_unpacked_archive_is_reported(nb, tiny, archive):
    path = place(archive, tiny)
    nb.load_images(tiny, True)
    path.unlink()
    (path.parent / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"")
    with pytest.raises(ValueError, match="incomplete or damaged: delete it"):
        nb.load_images(tiny, True)


# ---------------------------------------------------------------------------------------------- download


@pytest.fixture
def host(archive):
    """A server on loopback: /whole, /wrong, /half, /slow, /dead, and 404 for anything else."""
    data, stop = archive.read_bytes(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.strip("/")
            if kind == "dead":
                stop.wait(30)
                return
            self.send_response(200 if kind in ("whole", "wrong", "half", "slow") else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if kind in ("whole", "half"):
                self.wfile.write(data if kind == "whole" else data[: len(data) // 2])
            elif kind == "wrong":
                self.wfile.write(b"x" * len(data))
            elif kind == "slow":
                for byte in data[:600]:
                    if stop.wait(0.05):
                        break
                    self.wfile.write(bytes([byte]))

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    stop.set()
    server.shutdown()
    server.server_close()


def test_a_whole_download_is_used(nb, tiny, host, monkeypatch):
    monkeypatch.setattr(nb, "MIRRORS", (f"{host}/missing", f"{host}/whole"))
    images = nb.load_images(nb.replace(tiny, download=True, train_images=0), True)
    assert images.source == "CIFAR-10, official archive" and len(images) == 100


@pytest.mark.parametrize(
    ("kind", "message"),
    [("wrong", "wrong MD5"), ("half", "wrong MD5"), ("slow", "kB/s"), ("dead", "timed out|kB/s"), ("no", "404")],
)
def test_a_failing_host_is_left_soon_and_leaves_nothing(nb, tmp_path, host, kind, message):
    target, start = tmp_path / "to" / nb.ARCHIVE, time.monotonic()
    problem = nb.fetch(f"{host}/{kind}", target, nb.MD5, patience=1.0)
    assert re.search(message, problem, re.IGNORECASE)
    assert time.monotonic() - start < 4
    time.sleep(0.2)
    assert not target.exists() and not list(target.parent.glob("*"))


def test_a_folder_that_cannot_be_written_is_a_reason_and_no_crash(nb, tmp_path, host):
    (tmp_path / "file").write_text("in the way")
    assert "file" in nb.fetch(f"{host}/whole", tmp_path / "file" / nb.ARCHIVE, nb.MD5)


def test_two_dead_hosts_cost_less_than_twenty_seconds(nb, tiny, host, monkeypatch):
    patience = inspect.signature(nb.fetch).parameters["patience"].default
    assert len(nb.MIRRORS) * (patience + 1.5) < 20  # a second of joining each
    monkeypatch.setattr(nb, "MIRRORS", (f"{host}/dead", f"{host}/dead"))
    monkeypatch.setattr(nb.fetch, "__defaults__", (1.0, 100e3))
    start = time.monotonic()
    assert "stand-in" in nb.load_images(nb.replace(tiny, download=True), True).source
    assert time.monotonic() - start < 2 * (1.0 + 1.5) + 2


def test_without_network_the_stand_in_takes_over_and_says_so(nb, tiny, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(nb, "MIRRORS", tuple(f"http://127.0.0.1:{port}/{n}" for n in (1, 2)))
    start = time.monotonic()
    train = nb.load_images(nb.replace(tiny, download=True, train_images=0), True)
    assert time.monotonic() - start < 20
    said = [line for line in capsys.readouterr().out.splitlines() if "stand-in" in line]
    assert len(said) == 1 and "127.0.0.1" in said[0] and "using stand-in images, not CIFAR-10" in said[0]
    test = nb.load_images(tiny, False)
    assert train.source == test.source == "stand-in images, not CIFAR-10"
    assert train.class_names == tuple(nb.CLASSES) and (torch.bincount(train.labels) == len(train) // 10).all()


def test_stand_in_parts_do_not_overlap(nb):
    train, test = nb.from_standin(True), nb.from_standin(False)
    seen = {image.numpy().tobytes() for image in train.images}
    assert len(train) >= 300 and len(test) >= 60 and not any(x.numpy().tobytes() in seen for x in test.images)


def test_a_missing_stand_in_is_reported(nb, tmp_path):
    with pytest.raises(ValueError, match="standin.png is missing"):
        nb.from_standin(True, tmp_path / "standin.png")


# ----------------------------------------------------------------------------------------------- batches


def test_batches_visit_every_image_once_an_epoch_and_go_on_anywhere(nb, own_images, tiny):
    images = nb.load_images(nb.replace(tiny, data_dir=str(own_images), train_images=30), True)
    stamped = nb.replace(images, labels=torch.arange(30))
    labels = torch.cat([nb.batch_at(step, stamped, 7, seed=1)[1] for step in range(13)])
    assert sorted(labels[:30].tolist()) == list(range(30)) and sorted(labels[30:60].tolist()) == list(range(30))
    assert labels[:30].tolist() != labels[30:60].tolist()
    assert nb.batch_at(9, stamped, 7, seed=1)[1].tolist() == labels[63:70].tolist()
    assert sorted(nb.batch_at(0, stamped, 90, seed=1)[1].tolist()) == sorted(3 * list(range(30)))  # three epochs in one


def test_batches_flip_about_half_and_only_left_to_right(nb):
    ramp = torch.arange(4, dtype=torch.uint8).expand(1, 3, 4, 4).contiguous() * 60
    images = nb.ImageSet(ramp.expand(400, -1, -1, -1).contiguous(), torch.zeros(400, dtype=torch.int64), ("a",), "x")
    x_0, _ = nb.batch_at(0, images, 400, seed=0)
    assert x_0.dtype == torch.float32 and x_0.min() == -1 and x_0.max() <= 1
    flipped = x_0[:, 0, 0, 0] > x_0[:, 0, 0, 3]
    assert 150 < flipped.sum() < 250
    unit = nb.to_unit(ramp)
    assert torch.equal(x_0[flipped][0], unit[0].flip(2)) and torch.equal(x_0[~flipped][0], unit[0])


def test_a_data_dir_that_cannot_work_is_named_and_nothing_is_fetched(nb, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(nb, "fetch", lambda *_: pytest.fail("fetched"))
    (tmp_path / "file.zip").write_text("x")
    with pytest.raises(ValueError, match="is a file: name the folder"):
        nb.load_images(nb.replace(tiny, data_dir=str(tmp_path / "file.zip"), download=True), True)
    paint(tmp_path / "flat")
    (tmp_path / "flat" / "train").rename(tmp_path / "loose")
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.JPEG").write_bytes(b"")
    for name in ("loose", "photos"):
        with pytest.raises(ValueError, match="has images but no train/ and test/"):
            nb.load_images(nb.replace(tiny, data_dir=str(tmp_path / name), download=True), True)


def test_first_of_each_passes_over_a_class_without_images(nb):
    images = nb.ImageSet(
        torch.zeros(5, 3, 8, 8, dtype=torch.uint8), torch.tensor([2, 0, 2, 0, 0]), ("a", "b", "c"), "x"
    )
    assert nb.first_of_each(images, 2).tolist() == [1, 3, 0, 2]


def test_subset_is_fixed_by_its_seed(nb, own_images, tiny):
    images = nb.load_images(nb.replace(tiny, data_dir=str(own_images), train_images=0), True)
    a, b, c = images.subset(10, 1), images.subset(10, 1), images.subset(10, 2)
    assert torch.equal(a.images, b.images) and not torch.equal(a.images, c.images)
    assert len(images.subset(0)) == len(images.subset(10**6)) == len(images)
