"""The notebook as a whole: it runs from every source, and what is committed was run and keeps to its budgets."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import loader
import nbformat
import numpy as np
import papermill
import pytest
from conftest import make_cifar_batches, paint
from nbconvert import PythonExporter

ROOT = loader.NOTEBOOK.parent


def committed(name: str) -> bytes:
    """A file of the last commit: README's first command runs the notebook in place, which is not to be judged."""
    if shutil.which("git") and (ROOT / ".git").exists():
        shown = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True)
        if shown.returncode == 0:  # git refuses folders of another owner
            return shown.stdout
    return (ROOT / name).read_bytes()


STORED = committed("DiffusionModel.ipynb")
NOTEBOOK = nbformat.reads(STORED.decode("utf-8"), as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]


def figures_named(sources) -> set:
    """The names in calls of show(fig, NAME) and show_images(x, columns, NAME)."""
    names = set()
    for call in (node for source in sources for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        position = {"show": 1, "show_images": 2}.get(getattr(call.func, "id", ""), 99)
        if len(call.args) > position and isinstance(call.args[position], ast.Constant):
            names.add(call.args[position].value)
    return names


def what_was_said(cells) -> tuple[str, dict]:
    """All words that executed cells have put out, and how many of each kind of picture; errors and warnings fail."""
    words = []
    kinds = dict.fromkeys(("image/png", "image/gif", "application/vnd.jupyter.widget-view+json"), 0)
    for output in (output for cell in cells if cell.cell_type == "code" for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
        data = output.get("data", {})
        words += [output.get("text", ""), *[str(data[kind]) for kind in data if kind.startswith("text/")]]
        for kind in kinds:
            kinds[kind] += kind in data
    assert "Warning" not in "\n".join(words)
    return "\n".join(words), kinds


# ------------------------------------------------------------------------------------------ it runs
TRUST = "import torchvision.datasets.cifar as cifar; cifar.check_integrity = lambda *_: True\n"
NO_IPYTHON = "import sys; sys.modules.update(dict.fromkeys(['IPython', 'ipywidgets', 'jupyter_client']))\n"


def run_script(folder: Path, prelude: str = "", **settings) -> subprocess.CompletedProcess:
    """Run the notebook as a plain script without IPython in `folder`, with lines added below its settings."""
    source, _ = PythonExporter().from_filename(str(loader.NOTEBOOK))
    lines = "".join(f"{name} = {value!r}\n" for name, value in {"preset": "smoke", "device": "cpu", **settings}.items())
    source, count = re.subn(r"^(seed = .*\n)", rf"\1{lines}", source, count=1, flags=re.MULTILINE)
    assert count == 1
    (folder / "DiffusionModel.py").write_text(source, encoding="utf-8")
    code = NO_IPYTHON + prelude + "import runpy; runpy.run_path('DiffusionModel.py', run_name='__main__')"
    options = dict(cwd=folder, env={**os.environ, "MPLBACKEND": "agg"}, timeout=900)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", **options)


def check_run(folder: Path, source: str) -> dict:
    """What every run leaves: its figures, the cleaned picture, weights, a checkpoint, and results with their facts."""
    names = figures_named(loader.code_cells())
    found = {path.stem for path in (folder / "runs" / "figures").glob("*.png")}
    assert names - {"mistakes"} <= found <= names and len(names) > 20
    for file in ("figures/reverse.gif", "denoised.png", "smoke/weights.safetensors", "smoke/checkpoint.pt"):
        assert (folder / "runs" / file).stat().st_size > 1000, file
    report = json.loads((folder / "runs" / "results.json").read_text(encoding="utf-8"))
    assert {"weights", "training", "torch", "config", "seconds", "results"} <= set(report)
    assert report["training"]["images_seen"] == 64 and report["config"]["preset"] == "smoke"
    assert {"test noise MSE", "sampling, images/s", "accuracy"} <= set(report["results"])
    for name, entry in report["results"].items():
        assert {"value", "images", "source", "weights", "device"} <= set(entry), name
        assert entry["source"] == source and np.isfinite(entry["value"]).all(), name
    return report


def test_as_a_plain_script_without_ipython_on_stand_in_images(tmp_path):
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    done = run_script(tmp_path, download=False)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("using stand-in images, not CIFAR-10") == 1
    report = check_run(tmp_path, source="stand-in images, not CIFAR-10")
    rows = done.stdout[done.stdout.index("| measure |") :]
    assert all(re.search(rf"\| {re.escape(name)}[^|]* \|", rows) for name in report["results"])
    assert "stand-in images, not CIFAR-10" in rows


def test_the_notebook_alone_runs_from_the_official_archive(nb, tmp_path):
    make_cifar_batches(tmp_path / "data" / "cifar-10-batches-py", nb.CLASSES)
    done = run_script(tmp_path, TRUST, classify_images=4, eval_images=4)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    assert "use: trained here, 64 images seen" in done.stdout
    report = check_run(tmp_path, source="CIFAR-10, official archive")
    assert report["results"]["accuracy"]["images"] == report["results"]["test noise MSE"]["images"] == 4


def test_as_a_script_on_images_of_one_class_and_another_shape(tmp_path):
    paint(tmp_path / "mine", classes=("only",), counts=(12, 5), size=(20, 12))
    done = run_script(tmp_path, data_dir="mine", schedule="linear", flip=False)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr[-3000:]
    assert "(3, 20, 12), 1 classes" in done.stdout and "nan" not in done.stdout
    check_run(tmp_path, source="own images in mine/")


def with_papermill(folder: Path, **parameters):
    settings = {"preset": "smoke", "device": "cpu", "data_dir": "mine", **parameters}
    options = dict(parameters=settings, cwd=str(folder), kernel_name="python3", progress_bar=False)
    return papermill.execute_notebook(str(loader.NOTEBOOK), str(folder / "out.ipynb"), **options)


def test_as_a_notebook_on_own_images_of_three_classes(tmp_path):
    paint(tmp_path / "mine")
    given = dict(widths=[16, 24], optimizer="adamw", learning_rate=0.001)
    said, kinds = what_was_said(with_papermill(tmp_path, **given).cells)
    assert "3 classes" in said and "use: trained here, 64 images seen (image_shape, num_classes" in said
    report = check_run(tmp_path, source="own images in mine/")
    assert given.items() <= report["config"].items()
    figures = len(list((tmp_path / "runs" / "figures").glob("*.png")))
    assert list(kinds.values()) == [figures + 2, 1, 2]  # with two sliders


def test_a_wrong_or_unknown_setting_stops_before_any_work_with_one_sentence(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        with_papermill(tmp_path, epochs=5)
    assert caught.value.ename == "ValueError" and caught.value.evalue.startswith("there is no setting 'epochs'")
    last = run_script(tmp_path, schedule="sigmoid").stderr.strip().splitlines()[-1]
    assert last == "ValueError: schedule = 'sigmoid' must be one of cosine, linear"
    assert "\n" not in caught.value.evalue and not (tmp_path / "runs").exists()
    known = papermill.inspect_notebook(str(loader.NOTEBOOK))  # papermill warns of what it does not know
    assert list(known) == [line.split(" = ")[0] for line in loader.code_cells()[2].splitlines()]


# ----------------------------------------------------------------------------- what is committed was run
def test_the_committed_notebook_was_run_from_top_to_bottom_with_the_committed_results_and_weights(nb):
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert NOTEBOOK.metadata.language_info.file_extension == ".py"  # or nbconvert writes a script named .txt
    said, kinds = what_was_said(CODE)
    assert (
        kinds["image/png"] >= len(figures_named(cell.source for cell in CODE)) + 1
    )  # two sliders; perhaps no mistakes
    assert not re.search(r"/(root|home|work|tmp|Users)/", said + json.dumps(NOTEBOOK.metadata))
    report = json.loads(committed("assets/results.json"))
    for name, entry in report["results"].items():
        values = ", ".join(f"{v:.4g}" for v in np.atleast_1d(entry["value"]))
        if "interval" in entry:
            values += " (95 %: {:.2f} to {:.2f})".format(*entry["interval"])
        made = {"steps": list, "sigma": tuple}  # JSON has lists for both
        where = "".join(f", {knob} {kind(entry[knob])}" for knob, kind in made.items() if knob in entry)
        assert f"| {name}{where} | {values} | {entry['images']} |" in said
        assert entry["source"] in said and entry["weights"] == report["weights"] and entry["device"] == "cpu"
    assert report["training"] == nb.load_weights(ROOT / "assets" / "unet-cifar10.safetensors").facts


def test_the_notebook_keeps_to_its_budgets():
    lengths = [sum(1 for line in cell.source.splitlines() if line.strip()) for cell in CODE]
    words = sum(len(cell.source.split()) for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    found = dict(cells=len(CODE), lines=sum(lengths), longest=max(lengths), words=words, bytes=len(STORED))
    limits = dict(cells=72, lines=1490, longest=45, words=5000, bytes=6_000_000)
    assert {name: n for name, n in found.items() if n > limits[name]} == {}


def test_public_functions_are_documented(nb):
    names = """make_config load_images linear_schedule cosine_schedule make_schedule q_sample timestep_embedding UNet
    diffusion_loss train save_checkpoint load_checkpoint save_weights load_weights sample solve denoise denoise_picture
    classify evaluate_classifier""".split()
    assert [name for name in names if len(getattr(nb, name).__doc__) < 30] == []


def test_ruff_finds_nothing_and_nothing_is_suppressed():
    paths = ["DiffusionModel.ipynb", "tests", "benchmarks"]
    for command in (["check"], ["format", "--check"]):
        call = [sys.executable, "-m", "ruff", *command, "--config", ".ci/ruff.toml", "--no-cache", *paths]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    sources = [path.read_text(encoding="utf-8") for folder in paths[1:] for path in (ROOT / folder).glob("*.py")]
    for source in (*sources, *loader.code_cells()):
        assert not re.search(r"# ?(noqa|fmt: ?(off|skip)|ruff: ?noqa|type: ?ignore)", source)


def test_shipped_weights_keep_to_their_limits(nb):
    path = ROOT / "assets" / "unet-cifar10.safetensors"
    model = nb.load_weights(path)
    gigaflop = float(re.search(r"([\d.]+) GFLOP", nb.describe(model)).group(1))
    assert path.stat().st_size < 16 * 2**20 and gigaflop <= 2.0
    nb.check_same(model.config, nb.make_config("cpu", device="cpu"), "the shipped weights")
    assert {"images_seen", "steps", "seconds", "device", "data"} <= set(model.facts)


def test_readme_has_the_two_commands_and_its_pictures():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start = "python3 -m venv .venv && .venv/bin/pip install -r "
    assert start + "requirements.txt && .venv/bin/jupyter execute --inplace DiffusionModel.ipynb\n" in text
    assert start + "tests/requirements.txt && .venv/bin/python -m pytest\n" in text
    for picture in re.findall(r"\]\((assets/[^)]+)\)", text) + re.findall(r'src="(assets/[^"]+)"', text):
        assert (ROOT / picture).exists(), picture
