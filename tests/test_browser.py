"""The notebook in JupyterLab, in headless Chromium: run all, move the sliders, edit a setting."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import loader
import nbformat
import pytest
from conftest import paint
from test_notebook import figures_named

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = {
    "apputils-extension/notification": {"doNotDisturbMode": True, "fetchNews": "false"},
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page
}
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()
CELLS = "jupyterapp.shell.currentWidget.content.model.toJSON().cells.filter(cell => cell.cell_type == 'code')"


def strip(folder: Path) -> None:
    """The notebook without outputs, set to the smoke preset on the images in mine/."""
    notebook = nbformat.read(loader.NOTEBOOK, as_version=4)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs, cell.execution_count = [], None
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace('"auto"', '"smoke"').replace('data_dir = "data"', 'data_dir = "mine"')
    nbformat.write(notebook, folder / "DiffusionModel.ipynb")


@pytest.fixture
def lab(tmp_path):
    """The address of a JupyterLab in a folder with the notebook and a few images."""
    paint(tmp_path / "mine", size=(8, 8))
    strip(tmp_path)
    for name, settings in QUIET.items():
        path = tmp_path / "lab" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "lab"), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    own["OMP_NUM_THREADS"] = "1"  # the network is small, and the browser needs a core, too
    call = f"-m jupyter lab --no-browser --allow-root --port {port} --LabApp.expose_app_in_browser=True".split()
    log = open(tmp_path / "lab.log", "w")
    token = ["--IdentityProvider.token=", "--ServerApp.password="]
    server = subprocess.Popen(
        [sys.executable, *call, *token], cwd=tmp_path, env=os.environ | own, stdout=log, stderr=log
    )
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api", timeout=5)
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, (tmp_path / "lab.log").read_text()
                time.sleep(0.3)
        yield f"http://127.0.0.1:{port}/lab/tree/DiffusionModel.ipynb"
    finally:
        server.terminate()
        server.wait(30)


def changed(page, image, before: str) -> bool:
    """Whether the picture gets another source than `before` within half a minute."""
    until = time.monotonic() + 30
    while image.get_attribute("src") == before and time.monotonic() < until:
        page.wait_for_timeout(100)
    return image.get_attribute("src") != before


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_in_jupyterlab_all_figures_are_drawn_sliders_move_and_a_setting_takes_effect(lab, tmp_path):
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(150_000)
        page.goto(lab)
        page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.info")
        page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
        cells = page.evaluate(CELLS)
        outputs = [output for cell in cells for output in cell["outputs"]]
        errors = [f"{out['ename']}: {out['evalue']}" for out in outputs if out["output_type"] == "error"]
        assert errors == [] and all(cell["execution_count"] for cell in cells)
        assert not [out["text"] for out in outputs if out.get("name") == "stderr"]
        names = figures_named("".join(cell["source"]) for cell in cells) - {"mistakes"}
        drawn = page.evaluate("[...document.querySelectorAll('.jp-OutputArea img')].map(image => image.naturalWidth)")
        assert len(drawn) >= len(names) + 3 and min(drawn) > 50  # and the animation, and two with sliders
        assert page.locator(".jp-OutputArea table").count() == 1  # the results

        pictures = page.locator("img.widget-image")
        for number, image in enumerate((pictures.nth(0), pictures.nth(1))):
            before = image.get_attribute("src")
            page.locator(".noUi-handle").nth(number).focus()
            page.keyboard.press("ArrowLeft")
            assert changed(page, image, before)
        before = pictures.nth(1).get_attribute("src")
        page.locator(".widget-dropdown select").select_option("cup")
        assert changed(page, pictures.nth(1), before)

        for theme in ("JupyterLab Light", "JupyterLab Dark"):
            page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: '{theme}'}})")
            for number, text in enumerate(("Settings", "What it has learned", "Reverse evolution", "Explore")):
                page.locator(f".jp-RenderedMarkdown :is(h2, h3):has-text('{text}')").scroll_into_view_if_needed()
                page.wait_for_timeout(700)
                page.screenshot(path=tmp_path / f"{theme.split()[1].lower()}-{number}.png")

        setting = page.locator(".cm-line", has_text="train_steps = None")
        setting.scroll_into_view_if_needed()
        setting.locator("span", has_text="None").first.dblclick()
        page.keyboard.type("5")
        shown = next(k for k, cell in enumerate(cells) if "Accelerator(cpu" in "".join(cell["source"]))
        page.evaluate(f"""async () => {{
            const notebook = jupyterapp.shell.currentWidget.content
            const code = notebook.widgets.filter(cell => cell.model.type == 'code')
            notebook.activeCellIndex = notebook.widgets.indexOf(code[{shown + 1}])
            await jupyterapp.commands.execute('notebook:run-all-above')
        }}""")
        said = page.evaluate(CELLS)[shown]["outputs"][0]["text"]
        assert "train_steps     5 " in "".join(said)
        browser.close()
