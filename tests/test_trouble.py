"""What goes wrong on people's machines: wrong folders, odd pictures, killed runs, full disks, damaged files."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import images_of, paint
from PIL import Image, PngImagePlugin
from test_notebook import run_script

resource = pytest.importorskip("resource", reason="Windows knows neither limits on files nor fork")
TESTS = str(Path(__file__).parent)


# ------------------------------------------------------------------------------------------- 1 wrong folders
def only_webp(folder: Path) -> None:
    for name in ("train/cup", "test/cup"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(folder / name / "0.webp")
    Image.new("RGB", (16, 16)).save(folder / "test" / "cup" / "1.tiff")


def flat(folder: Path) -> None:
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "0.png")


WRONG = {  # what lies there, and what a user reads
    "a flat folder": (flat, "photos holds 0.png, not what is looked for: it must hold {train,test}/<class>/"),
    "capitals": (lambda folder: paint(folder / "x").rename(folder / "Train"), "photos holds Train, not"),
    "another name": (lambda folder: (folder / "training").mkdir(parents=True), "photos holds training, not"),
    "too deep": (lambda folder: paint(folder / "inner"), "photos holds inner, not"),
    "a zip": (lambda folder: (folder.mkdir(), (folder / "train.zip").write_bytes(b"PK")), "photos holds train.zip"),
    "missing": (lambda folder: None, "photos does not exist: .* or be empty for a download"),
    "no classes": (lambda folder: flat(folder) or flat(folder / "train"), "photos/train must hold <class>/"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_folder_is_no_place_for_a_download(nb, tiny, tmp_path, monkeypatch, kind):
    make, message = WRONG[kind]
    make(tmp_path / "photos")
    monkeypatch.setattr(nb, "fetch", lambda *_: pytest.fail("downloads"))
    with pytest.raises(ValueError, match=message.replace("{", r"\{")):
        nb.load_images(nb.replace(tiny, data_dir=str(tmp_path / "photos"), download=True), True)


@pytest.mark.parametrize("inside", ["train", "test", "cifar-10-batches-py"])
def test_a_folder_one_level_too_deep_names_the_one_above(nb, tiny, tmp_path, inside):
    paint(tmp_path / "photos")
    if inside not in ("train", "test"):
        (tmp_path / "photos" / "train").rename(tmp_path / "photos" / inside)
    with pytest.raises(ValueError, match=f"photos/{inside} holds .*: use .*photos$"):
        nb.load_images(nb.replace(tiny, data_dir=str(tmp_path / "photos" / inside), download=True), True)


def test_an_empty_folder_is_where_a_download_goes(nb, tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(nb, "fetch", lambda url, path, md5: asked.append(path) or paint(path.parent))
    assert len(nb.load_images(nb.replace(tiny, download=True), True)) == 72 and asked == [
        tmp_path / "data" / nb.ARCHIVE
    ]


# ------------------------------------------------------------------------------------------------ 2 pictures
def test_webp_is_read_and_what_is_ignored_is_counted_in_one_line(nb, tiny, tmp_path, capsys):
    only_webp(tmp_path / "photos")
    config = nb.replace(tiny, data_dir=str(tmp_path / "photos"))
    (tmp_path / "photos" / "test" / "cup" / "._0.png").write_bytes(b"of a Mac")
    assert len(nb.load_images(config, True)) == len(nb.load_images(config, False)) == 1
    assert capsys.readouterr().out.count("photos/test: 2 files ignored") == 1


@pytest.mark.parametrize("mode", ["LA", "P", "RGBA"])
def test_colours_under_full_transparency_are_not_learned(nb, tmp_path, mode):
    glass = Image.new("RGBA", (4, 4), (10, 200, 10, 0)).convert(mode)
    glass.save(tmp_path / "glass.png", **({"transparency": glass.getpixel((0, 0))} if mode == "P" else {}))
    assert nb.read_picture(tmp_path / "glass.png").min() == 255


def test_pictures_that_no_network_should_see_are_named(nb, tmp_path, monkeypatch):
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Comment", "a" * 2_000_000, zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "text.png", pnginfo=text)
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(np.full((8, 8), 30_000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("L", (50, 50)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name in ("text.png", "float.tiff", "deep.png", "bomb.png"):
        with pytest.raises(ValueError, match=f"{name} is not a readable picture .*: replace or delete it"):
            nb.read_picture(tmp_path / name)


# ------------------------------------------------------- 4, 5, 6, 12 cells again, few images, two runs, names
CELLS = """
import os, sys, types
sys.path.insert(0, {tests!r})
import loader
cells = loader.code_cells()
module = types.ModuleType("cells")
sys.modules["cells"] = module

def run(number):
    own = "\\npreset = 'smoke'; device = 'cpu'; widths = [8]; data_dir = 'mine'; own_picture = 'small.png'" * (number == 2)
    exec(compile(cells[number] + own, f"cell {{number}}", "exec"), module.__dict__)

for number in range(len(cells)):
    run(number)
if os.fork() == 0:  # another run in the same folder: a process that shares nothing but the disk
    os.execv(sys.executable, [sys.executable, "-c", {second!r}])
print("second run ended with", os.waitstatus_to_exitcode(os.wait()[1]))
print("BACKWARDS")
for number in reversed(range(len(cells))):
    run(number)
module.config = module.make_config("smoke", device="cpu")  # settings changed, section 2 not run again
first, last = (next(n for n, cell in enumerate(cells) if word in cell) for word in ("first-samples", "confusion"))
for number in range(first, last + 1):
    run(number)
print(tuple(module.drawn.shape[1:]), "drawn after section 1 again")
try:
    module.train(module.config, module.train_set)
except ValueError as error:
    print(error)
"""
SECOND = """
import sys
sys.path.insert(0, {tests!r})
import loader
for number, cell in enumerate(loader.code_cells()):
    exec(cell + "\\npreset = 'smoke'; device = 'cpu'" * (number == 2))
    if number == 7:
        break
"""


def test_few_images_odd_names_two_runs_and_every_cell_again_in_reverse_order(tmp_path):
    paint(tmp_path / "mine", classes=("$5 or $10", "猫"), counts=(3, 1), size=(8, 8))
    Image.new("RGB", (5, 3), "red").save(tmp_path / "small.png")
    code = CELLS.format(tests=TESTS, second=SECOND.format(tests=TESTS))
    options = dict(cwd=tmp_path, env={**os.environ, "MPLBACKEND": "agg"}, timeout=600)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr and "second run ended with 1" in done.stdout
    assert "run_dir = 'runs' is used by another run: end it, or name another folder" in done.stderr
    assert "(3, 8, 8) drawn after section 1 again" in done.stdout
    assert done.stdout.strip().endswith("the images do not fit config: run section 2 again")
    text = (tmp_path / "runs" / "results.json").read_text(encoding="utf-8")
    assert "NaN" not in text and json.loads(text)["config"]["num_classes"] == 2
    assert Image.open(tmp_path / "runs" / "denoised.png").size == (5, 3)
    assert not list(tmp_path.rglob("*.part"))


def test_a_side_too_small_for_a_filter_is_refused_before_training(tmp_path):
    paint(tmp_path / "mine", counts=(2, 1), size=(3, 9))
    done = run_script(tmp_path, data_dir="mine", widths=[8])
    assert "ValueError: images of (3, 9) pixels are too small: at least 4×4" in done.stderr
    assert "step/s" not in done.stdout


# ------------------------------------------------------------------------------------------------- 7 run_dir
def test_a_run_dir_that_cannot_be_written_is_named_and_what_a_killed_run_left_goes(nb, tmp_path):
    (tmp_path / "file").write_text("a file")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/runs")):
        with pytest.raises(ValueError, match="run_dir = .* cannot be written .*: name another folder"):
            nb.lock_run_dir(folder)
    left = tmp_path / "runs" / "smoke" / "checkpoint.pt.123.part"
    left.parent.mkdir(parents=True)
    left.write_text("half a checkpoint")
    theirs = [left.parent / name for name in ("film.2024.mkv.part", "film.2024.part", "backup.7z.001.part")]
    for path in theirs:
        path.write_text("not ours")
    held = nb.lock_run_dir(tmp_path / "runs")
    held = nb.lock_run_dir(tmp_path / "runs")  # the cell run again
    assert held.is_locked
    assert all(path.exists() for path in theirs) and not left.exists()


# --------------------------------------------------------------------------------------------- 8 killed runs
KILLS = """
import os, random, shutil, signal, sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import loader
from conftest import images_of
from pathlib import Path

nb = loader.load()
images = images_of(nb)
base = nb.make_config("smoke", device="cpu", image_shape=(3, 8, 8), widths=(16,), train_steps=60)
sys.stdout = open(os.devnull, "w")

def victim(folder, resume=False):
    pid = os.fork()
    if pid == 0:
        run = nb.train(nb.replace(base, run_dir=str(folder)), images, resume=resume, save_every=-1)
        torch.save([*run.model.parameters(), *run.network.parameters()], folder / "end.pt")
        os._exit(0)
    return pid

start = time.monotonic()
Path("whole").mkdir()
os.waitpid(victim(Path("whole")), 0)
duration = time.monotonic() - start
whole = torch.load("whole/end.pt")
dice = random.Random(0)
recovered = midwrite = resumed = 0
def killed(number, folder):
    # True if the run was killed (odd numbers: in the middle of a write), False if it ended before
    folder.mkdir()
    pid = victim(folder)
    until = time.monotonic() + dice.uniform(0.1, 0.95) * duration
    while time.monotonic() < until or number % 2:
        if number % 2 and time.monotonic() > until - 0.3 * duration and list(folder.glob("smoke/*.part")):
            break
        if os.waitpid(pid, os.WNOHANG)[0]:
            return False
        time.sleep(0.0003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True

for number in range(25):
    folder = Path(str(number))
    while not killed(number, folder):  # the machine has become faster
        shutil.rmtree(folder)
        duration *= 0.9
    midwrite += bool(list(folder.glob("smoke/*.part")))
    resumed += (folder / "smoke" / "checkpoint.pt").exists()
    os.waitpid(victim(folder, resume=True), 0)
    recovered += all(map(torch.equal, torch.load(folder / "end.pt"), whole))
print(recovered, midwrite, resumed, file=sys.stderr)
"""


def test_a_killed_run_resumes_to_the_undisturbed_weights_bit_for_bit(tmp_path, capsys):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-c", KILLS.format(tests=TESTS)]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    recovered, midwrite, resumed = map(int, done.stderr.strip().splitlines()[-1].split())
    with capsys.disabled():
        print(f"\nkilled 25 ({midwrite} in the middle of a write, {resumed} with a checkpoint), recovered {recovered}")
    assert recovered == 25 and midwrite >= 5 and resumed >= 12


def test_resuming_with_fewer_steps_than_were_done_says_so(nb, tiny, capsys):
    run = nb.train(tiny, images_of(nb))
    nb.save_checkpoint(nb.checkpoint_path(tiny), run)
    again = nb.train(nb.replace(tiny, train_steps=5), images_of(nb), resume=True)
    assert again.step == 8 and "resumed at step 8 of 5, nothing left to train" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- 9 a full disk
def test_a_full_disk_costs_no_earlier_file_and_one_cell_saves_again(nb, tiny, tmp_path):
    run = nb.train(tiny, images_of(nb))
    saves = {
        tmp_path / "checkpoint.pt": lambda path: nb.save_checkpoint(path, run),
        tmp_path / "w.safetensors": lambda path: nb.save_weights(path, run.model, {}),
    }
    for path, save in saves.items():
        save(path)
        before = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # as little as is left on the disk
        try:
            with pytest.raises(OSError):
                save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == before and not list(tmp_path.glob("*.part"))
        path.unlink()
        save(path)
        assert path.stat().st_size == len(before)


# ------------------------------------------------------------------------------ 10 damaged and hostile files
class Hostile:
    def __reduce__(self):
        return os.mkdir, ("it ran",)


def of_another_shape(nb, run, kind: str, path: Path, number: int) -> None:
    if kind == "checkpoint":
        nb.save_checkpoint(path, run)
        state = torch.load(path, weights_only=True)
        momenta = [entry for optimizer in state["optimizers"] for entry in optimizer["state"].values()]
        places = [state["network"], state["model"], *momenta]
        place = places[number % len(places)]
        name = next(name for name in list(place) if place[name].ndim)
        place[name] = place[name][..., :-1].clone()
        torch.save(state, path)
    else:
        tensors = {name: p.half().contiguous() for name, p in run.model.state_dict().items()}
        name = list(tensors)[number % len(tensors)]
        tensors[name] = tensors[name].flatten()[:-1].clone()
        metadata = {"config": json.dumps(nb.asdict(run.config)), "facts": "{}"}
        metadata["sha256"] = nb.check_sum(tensors, metadata)
        nb.save_file(tensors, path, metadata)


def mutate(nb, run, kind: str, whole: bytes, path: Path, number: int) -> None:
    dice = random.Random(number)
    way = number % 5
    if way == 0:
        path.write_bytes(whole[: dice.randrange(len(whole))])
    elif way < 3:  # one bit flipped: anywhere, or in what comes first or last, where the names and sizes are
        edge = dice.choice((range(2000), range(len(whole) - 2000, len(whole))))
        place = dice.randrange(len(whole)) if way == 1 else dice.choice(edge)
        changed = bytearray(whole)
        changed[place] ^= 1 << dice.randrange(8)
        path.write_bytes(changed)
    elif way == 3:
        of_another_shape(nb, run, kind, path, number)
    elif number % 2:
        path.write_bytes(pickle.dumps(Hostile()))
    else:
        torch.save({"config": Hostile()}, path)


def everything(state) -> list:
    """All tensors and numbers in nested dicts and lists, in order."""
    if isinstance(state, dict):
        state = list(state.values())
    return [x for part in state for x in everything(part)] if isinstance(state, (list, tuple)) else [state]


def test_damaged_and_hostile_files_are_refused_or_read_right_and_nothing_runs(nb, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = nb.train(tiny, images_of(nb))
    run.model.facts = {"images_seen": 64}
    path = tmp_path / "file"

    def read(kind):
        if kind == "checkpoint":
            found = nb.load_checkpoint(path, tiny)
            nb.save_checkpoint(tmp_path / "again", found)
            return everything(torch.load(tmp_path / "again", weights_only=True))
        model = nb.load_weights(path)
        return everything([model.state_dict(), nb.asdict(model.config), model.facts])

    count = {"refused": 0, "read right": 0}
    for kind in ("checkpoint", "weights"):
        if kind == "checkpoint":
            nb.save_checkpoint(path, run)
        else:
            nb.save_weights(path, run.model, run.model.facts)
        whole, wanted = path.read_bytes(), read(kind)
        for number in range(100):
            mutate(nb, run, kind, whole, path, number)
            try:
                found = read(kind)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)
                count["refused"] += 1
                continue
            same = [torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(found, wanted, strict=True)]
            assert all(same), (kind, number)
            count["read right"] += 1
    with capsys.disabled():
        print(f"\nfiles refused {count['refused']} or read right {count['read right']} of 200")
    assert sum(count.values()) == 200 and count["refused"] > 120 and not (tmp_path / "it ran").exists()


# ---------------------------------------------------------------------------------------------- 11 rate
def test_a_loss_that_stays_above_one_is_said_once(nb, tiny, capsys):
    nb.train(nb.replace(tiny, train_steps=60, learning_rate=1.0), images_of(nb))
    assert capsys.readouterr().out.count("the loss is above 1") == 1
    nb.train(nb.replace(tiny, train_steps=60, learning_rate=5e-3), images_of(nb))
    assert "the loss is above 1" not in capsys.readouterr().out
