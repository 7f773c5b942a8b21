"""The notebook as a whole: it runs from every source, and what is committed is what was run."""

import ast
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import loader
import nbformat
import numpy as np
import papermill
import pytest
from conftest import paint
from nbconvert import PythonExporter
from PIL import Image
from safetensors import safe_open

ROOT = loader.NOTEBOOK.parent


def committed(name: str) -> bytes | None:
    """A file of the last commit: README's first command runs the notebook in place, and that run is not ours to judge."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return None
    shown = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True)
    return shown.stdout if shown.returncode == 0 else None  # git refuses folders of another owner


GIT = committed("DiffusionModel.ipynb") is not None
STORED = committed("DiffusionModel.ipynb") or loader.NOTEBOOK.read_bytes()
NOTEBOOK = nbformat.reads(STORED.decode("utf-8"), as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
OUTPUTS = [output for cell in CODE for output in cell.outputs]
PRINTED = "".join(output.text for output in OUTPUTS if output.output_type == "stream")
FIGURES = {
    "training-images", "schedules", "forward", "forward-histograms", "timestep-embedding", "loss", "noise-histograms",
    "milestones", "loss-by-t", "generated-classes", "reverse", "steps", "guidance", "denoising-curves", "denoising",
    "picture", "what-t-knows", "classification", "confusion", "mistakes",
}  # fmt: skip


# ------------------------------------------------------------------------------------------ it runs


def place_cifar_like(data: Path) -> None:
    """A few images in CIFAR-10's own format, and torchvision told (in the child) to trust them."""
    import pickle

    import numpy as np

    folder, rng = data / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": rng.integers(0, 256, (40, 3072), dtype=np.uint8), "labels": list(range(10)) * 4}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))


TRUST = """
import hashlib, pathlib
from torchvision.datasets import CIFAR10
folder = pathlib.Path("data/cifar-10-batches-py")
md5 = lambda name: hashlib.md5((folder / name).read_bytes()).hexdigest()
CIFAR10.train_list = [[n, md5(n)] for n, _ in CIFAR10.train_list]
CIFAR10.test_list = [[n, md5(n)] for n, _ in CIFAR10.test_list]
CIFAR10.meta = {**CIFAR10.meta, "md5": md5("batches.meta")}
"""
NO_IPYTHON = """
import sys
class Absent:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("IPython", "ipykernel", "ipywidgets", "jupyter_client"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def as_script(folder: Path, **parameters) -> str:
    """The notebook as a plain script in `folder`, with assignments of its parameters cell replaced."""
    source, _ = PythonExporter().from_filename(str(loader.NOTEBOOK))
    for name, value in {"device": "cpu", **parameters}.items():
        source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", source, count=1, flags=re.MULTILINE)
        assert count == 1, name
    (folder / "DiffusionModel.py").write_text(source, encoding="utf-8")
    shutil.copytree(ROOT / "assets", folder / "assets")
    return source


def run_script(folder: Path, prelude: str = "") -> subprocess.CompletedProcess:
    code = NO_IPYTHON + prelude + "import runpy; runpy.run_path('DiffusionModel.py', run_name='__main__')"
    env = {**os.environ, "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=600
    )


def check_run(folder: Path, marked: bool) -> dict:
    names = {path.stem for path in (folder / "runs" / "figures").glob("*.png")}
    assert names == FIGURES
    results = json.loads((folder / "runs" / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["preset"] == "smoke" and "accuracy" in results["results"]
    for entry in results["results"].values():
        assert {"value", "images", "source", "weights", "device", "seconds"} <= set(entry)
        assert ("stand-in" in entry["source"]) == (marked and "photograph" not in entry["source"])
    assert {f"{s}, {what}" for s in ("ddpm", "ddim", "dpm++") for what in ("seconds", "off")} < set(results["results"])
    return results


def test_as_a_plain_script_without_ipython_on_stand_in_images(tmp_path):
    as_script(tmp_path, preset="smoke", download=False)
    done = run_script(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if "using stand-in images" in line]
    assert len(lines) == 1 and "Warning" not in done.stderr
    for start in (
        "80 images in", "rows, written to", "evaluations an image", "test images right", "rows: clean", "checkpoint, ",
        "untrained network", "noise MSE on one batch", "RMS error", "RMS difference", "between labels", "information",
    ):  # fmt: skip
        assert [line for line in done.stdout.splitlines() if start in line and "stand-in images, not" in line], start
    check_run(tmp_path, marked=True)


def test_as_a_plain_script_from_the_official_archive(tmp_path):
    as_script(tmp_path, preset="smoke")
    place_cifar_like(tmp_path / "data")
    done = run_script(tmp_path, TRUST)
    assert done.returncode == 0, done.stderr[-3000:]
    results = check_run(tmp_path, marked=False)
    assert results["results"]["accuracy"]["source"] == "CIFAR-10, official archive"


def test_as_a_notebook_on_own_images_with_three_classes(tmp_path):
    paint(tmp_path / "mine", counts=(24, 8), size=(32, 32))
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    made = papermill.execute_notebook(
        str(loader.NOTEBOOK), str(tmp_path / "out.ipynb"), cwd=str(tmp_path), kernel_name="python3",
        parameters={"preset": "smoke", "device": "cpu", "data_dir": "mine", "use_shipped_weights": True}, progress_bar=False,
    )  # fmt: skip
    outputs = [o for cell in made.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    printed = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "3 classes" in printed and "these images are not CIFAR-10's: going on with the weights trained" in printed
    assert len([o for o in outputs if "image/png" in o.get("data", {})]) == len(FIGURES) + 2  # and two sliders
    assert len([o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]) == 2
    check_run(tmp_path, marked=False)


def test_one_class_few_test_images_and_another_schedule(tmp_path):
    as_script(tmp_path, preset="smoke", data_dir="mine", schedule="cosine")
    paint(tmp_path / "mine", classes=("only",), counts=(12, 5), size=(20, 12))
    done = run_script(tmp_path)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    assert "(3, 20, 12), 1 classes" in done.stdout and "nan" not in done.stdout
    check_run(tmp_path, marked=False)


def test_a_wrong_setting_stops_before_any_work(tmp_path):
    as_script(tmp_path, preset="smoke", schedule="sigmoid")
    done = run_script(tmp_path)
    assert done.returncode != 0 and not (tmp_path / "runs").exists()
    assert done.stderr.strip().splitlines()[-1] == "ValueError: schedule = 'sigmoid' must be 'linear' or 'cosine'"


def test_training_and_test_images_of_two_sizes_are_named(tmp_path):
    as_script(tmp_path, preset="smoke", data_dir="mine")
    paint(tmp_path / "mine", counts=(12, 8), size=(32, 32))
    paint(tmp_path / "other", counts=(12, 8), size=(20, 24))
    shutil.rmtree(tmp_path / "mine" / "test")
    shutil.move(tmp_path / "other" / "test", tmp_path / "mine" / "test")
    last = run_script(tmp_path).stderr.strip().splitlines()[-1]
    assert last == "ValueError: mine: train/ has images of 32×32, test/ of 24×20 pixels: make all one size"


# ----------------------------------------------------------------------------- what is committed was run


def test_executed_from_top_to_bottom():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))


def test_outputs_hold_no_error_no_warning_and_no_path_of_a_machine():
    assert not [o for o in OUTPUTS if o.output_type == "error" or o.get("name") == "stderr"]
    assert "Warning" not in PRINTED
    text = json.dumps([{k: v for k, v in o.items() if k != "data"} for o in OUTPUTS])
    assert not re.search(r"/(root|home|work|tmp|Users)/", text)


def test_code_is_unchanged_since_it_was_run():
    *before, last = CODE
    cells = [cell.source.strip() for cell in (*before, last)]
    fingerprint = hashlib.sha256("\n".join(cells).encode()).hexdigest()[:16]
    assert f"code {fingerprint} " in PRINTED


def test_every_figure_is_shown():
    shown = [o for o in OUTPUTS if "image/png" in o.get("data", {})]
    assert len(shown) == len(FIGURES) + 2
    calls = re.findall(r"(?:show\(fig,|class_grid\([^\n]*,) \"([a-z-]+)\"", "\n".join(c.source for c in CODE))
    assert set(calls) == FIGURES


def test_size_and_shape_of_the_notebook():
    assert len(STORED) < 3_000_000
    lengths = [sum(1 for line in cell.source.splitlines() if line.strip()) for cell in CODE]
    assert max(lengths) <= 45 and statistics.median(lengths) <= 10
    assert sum(lengths) <= 1490 and len(NOTEBOOK.cells) - len(CODE) >= len(CODE)
    assert [i for i, cell in enumerate(CODE) if "parameters" in cell.metadata.get("tags", [])] == [1]


def test_public_functions_are_documented(nb):
    for source in loader.code_cells():
        for node in ast.parse(source).body:
            if (
                isinstance(node, ast.FunctionDef)
                and node.name
                in (
                    "load_images linear_schedule cosine_schedule make_schedule q_sample timestep_embedding diffusion_loss "
                    "train save_checkpoint load_checkpoint save_weights load_weights sample denoise classify make_config"
                ).split()
            ):
                assert ast.get_docstring(node), node.name


def test_ruff_finds_nothing():
    for command in (["check"], ["format", "--check"]):
        call = [sys.executable, "-m", "ruff", *command, "--config", ".ci/ruff.toml", "--no-cache"]
        done = subprocess.run([*call, "DiffusionModel.ipynb", "tests"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------ assets and README


def test_shipped_weights_keep_to_their_limits(nb):
    path = ROOT / "assets" / "unet-cifar10.safetensors"
    model = nb.load_weights(path)
    gigaflop = float(re.search(r"([\d.]+) GFLOP", nb.describe(model)).group(1))
    assert path.stat().st_size < 40e6 and gigaflop <= 2.0
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert {"images_seen", "steps", "seconds", "device", "data", "train_loss", "commit", "story"} <= set(facts)
    assert facts["images_seen"] == facts["steps"] * model.config.batch_size > 50_000
    assert facts["guide"]["images"] >= 100 and facts["guide"]["source"] == facts["data"]


def test_stand_in_sheet_has_a_row_for_every_class():
    with Image.open(ROOT / "assets" / "standin.png") as sheet:
        assert sheet.height == 10 * 32 and sheet.width % 32 == 0 and sheet.width // 32 >= 30


RESULTS = json.loads(committed("assets/results.json") or (ROOT / "assets" / "results.json").read_bytes())


@pytest.mark.skipif(not GIT, reason="without git, the committed notebook cannot be told from one that was run here")
def test_results_are_those_of_the_committed_notebook():
    facts = json.loads(safe_open(ROOT / "assets" / "unet-cifar10.safetensors", "pt").metadata()["facts"])
    assert RESULTS["training"] == facts and facts["story"] in PRINTED
    for name, entry in RESULTS["results"].items():
        least = (
            1 if "picture" in name else 5 if name.endswith((", seconds", ", off")) else 8
        )  # one photograph; five drawn
        assert entry["source"] in PRINTED and entry["images"] >= least and entry["device"] == "cpu"
        row = next(line for line in PRINTED.splitlines() if line[:43].rstrip() == name[:43].rstrip() and len(line) > 50)
        assert row[44:].split()[0] == str(entry["images"]), name
        assert row[44:].split()[2 : 2 + np.size(entry["value"])] == [
            f"{v:.4g}" for v in np.atleast_1d(entry["value"])
        ], name


def test_readme_quotes_only_measured_numbers():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+?) \| ([\d.]+)( %)? \| ([\d,]+) \| [^|]+ \|$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == ["accuracy", "test noise MSE, shipped weights", "sampling, images/s"]
    for name, value, unit, images in rows:
        entry = RESULTS["results"][name]
        shown = entry["value"] * (100 if unit else 1)
        digits = len(value.partition(".")[2])
        assert f"{shown:.{digits}f}" == value and int(images.replace(",", "")) == entry["images"], name
    sigmas = re.search(r"^\| method \| images \| ([\d |]+) \|$", text, re.MULTILINE).group(1).split(" | ")
    table = re.findall(r"^\| ([^|]+?) \| (\d+) \| ((?:[\d.]+ \| ){6}[\d.]+) \|$", text, re.MULTILINE)
    assert len(table) == 7 and len(sigmas) == 7
    for method, images, values in table:
        for sigma, value in zip(sigmas, values.split(" | ")):
            entry = RESULTS["results"][f"PSNR, {method}"]
            value_there = entry["value"][entry["sigma"].index(int(sigma))]
            assert f"{value_there:.2f}" == value and int(images) == entry["images"], (method, sigma)
    assert RESULTS["training"]["story"] in text
    checked = RESULTS["training"]["test_accuracy"]
    assert f"{checked['images']:,} test images: {100 * checked['value']:.1f} % right" in text


def test_readme_has_the_two_commands_and_its_pictures():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && "
    assert first + ".venv/bin/jupyter execute --inplace DiffusionModel.ipynb" in text
    assert "pip install -r tests/requirements.txt && .venv/bin/python -m pytest" in text
    for picture in re.findall(r"\]\((assets/[^)]+)\)", text) + re.findall(r'src="(assets/[^"]+)"', text):
        assert (ROOT / picture).exists(), picture
