"""One run on several processes: the same updates as one process makes, one checkpoint, one stop."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

WORKER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
import loader

torch.set_num_threads(1)
nb = loader.load()
steps, batch, resume, stop_at, die_at, out = {arguments!r}
config = nb.make_config("smoke", device="cpu", train_steps=steps, batch_size=batch, learning_rate=2e-4, run_dir=out, resume=resume)
dice = torch.Generator().manual_seed(0)
pixels = torch.randint(0, 256, (40, 3, 32, 32), generator=dice, dtype=torch.uint8)
images = nb.ImageSet(pixels, torch.arange(40) % 10, tuple("abcdefghij"), "random")
rank = nb.Accelerator(cpu=True).process_index
if rank == 1:  # what happens to one process only
    original = nb.train_step
    def disturbed(run, *args):
        loss = original(run, *args)
        if run.step == stop_at:
            signal.raise_signal(signal.SIGINT)
        if run.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss
    nb.train_step = disturbed
run = nb.train(config, images, resume=resume, save_every=-1)
torch.save(dict(step=run.step, losses=run.losses, network=run.network.state_dict(), model=run.model.state_dict()), f"{{out}}/{{rank}}.pt")
if run.accelerator.is_main_process:
    nb.save_checkpoint(nb.checkpoint_path(config), run)
run.accelerator.end_training()
"""


def train_on(folder: Path, processes: int, steps=20, batch=16, resume=False, stop_at=0, die_at=0) -> list[dict]:
    """What every one of `processes` has after training in `folder`."""
    folder.mkdir(exist_ok=True)
    arguments = (steps, batch, resume, stop_at, die_at, str(folder))
    script = folder / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent), arguments=arguments))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run([*launch, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train_on(tmp_path_factory.mktemp("alone"), 1)[0]


def distance(a: dict, b: dict, part: str) -> float:
    return max((a[part][name] - b[part][name]).abs().max().item() for name in a[part])


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_make_the_updates_of_one(alone, tmp_path, processes):
    found = train_on(tmp_path / "run", processes)
    for part in ("network", "model"):
        assert distance(alone, found[0], part) < 1e-5
        assert all(distance(found[0], other, part) == 0 for other in found)
    assert found[0]["losses"] == pytest.approx(alone["losses"], abs=1e-5)


def test_the_stop_button_of_one_stops_all_and_another_number_of_processes_goes_on(alone, tmp_path):
    found = train_on(tmp_path / "run", 2, stop_at=7)
    assert [state["step"] for state in found] == [7, 7]
    resumed = train_on(tmp_path / "run", 1, resume=True)[0]
    assert resumed["step"] == 20 and distance(alone, resumed, "model") < 1e-5


def test_a_process_that_dies_ends_the_others_and_the_run_goes_on_from_its_checkpoint(alone, tmp_path):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="SIGKILL"):
        train_on(tmp_path / "run", 2, die_at=15)
    assert time.monotonic() - start < 90  # the start of the processes included
    saved = torch.load(tmp_path / "run" / "smoke" / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 12  # the last milestone before
    resumed = train_on(tmp_path / "run", 2, resume=True)
    assert resumed[0]["step"] == 20 and distance(alone, resumed[0], "model") < 1e-5


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="batch_size = 15 must be divisible by 2 processes"):
        train_on(tmp_path / "run", 2, batch=15)
