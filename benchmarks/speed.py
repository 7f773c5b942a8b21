"""Speed, as ratios within one run: what is compared takes turns, and medians over the rounds are quoted.

python benchmarks/speed.py step --rounds 7 --threads 1 --name cpu-fp32     # a training step: this and the first edition's
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import loader

ROOT = Path(__file__).resolve().parent.parent

FIRST_EDITION = "1fbe517"


def first_edition():
    """The first edition's definitions, from git."""
    path = ROOT / "runs" / "first-edition.ipynb"
    path.parent.mkdir(exist_ok=True)
    show = ["git", "show", f"{FIRST_EDITION}:DiffusionModel.ipynb"]
    path.write_bytes(subprocess.run(show, cwd=ROOT, check=True, capture_output=True).stdout)
    return loader.load(path, "first_edition")


def trainer(nb, precision: str, batch: int, **settings):
    """A function that takes one training step of the gpu preset's network on random images."""
    config = nb.make_config("gpu", device="cpu", precision=precision, batch_size=batch, **settings)
    run = nb.new_run(config)
    alpha_bar = nb.make_schedule(config)
    x_0 = torch.rand(batch, 3, 32, 32) * 2 - 1
    y = torch.arange(batch) % 10
    return lambda: nb.train_step(run, x_0, y, alpha_bar)


def interleaved(arms: dict, rounds: int) -> dict:
    """Seconds of every call of every arm, taking turns, after one call each to warm up."""
    seconds = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, work in arms.items():
            start = time.perf_counter()
            work()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def step(args) -> dict:
    arms = {
        "second edition": trainer(loader.load(), args.precision, args.batch),
        "first edition": trainer(first_edition(), args.precision, args.batch),
    }
    seconds = interleaved(arms, args.rounds)
    ratios = sorted(old / new for new, old in zip(*seconds.values()))
    rates = {name: round(args.batch / statistics.median(times), 2) for name, times in seconds.items()}
    return {"images_per_second": rates, "ratio": statistics.median(ratios), "ratio_range": [ratios[0], ratios[-1]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step",))
    parser.add_argument("--name", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured = {"step": step}[args.what](args)
    cpu = torch.cpu.get_capabilities()
    measured |= {name: getattr(args, name) for name in ("precision", "batch", "rounds", "threads")}
    measured |= {"cpu": cpu["cpu_name"], "fast in bf16": bool(cpu["avx512_bf16"] or cpu["amx_bf16"])}
    measured["torch"] = torch.__version__
    path = ROOT / "benchmarks" / "results" / f"{args.what}-{args.name}.json"
    path.write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
