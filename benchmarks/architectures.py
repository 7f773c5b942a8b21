"""Shapes of UNet trained for the same time, at about the cost of the shipped one a pass: results/architectures.json.

    .venv/bin/pip install -r benchmarks/requirements.txt
    .venv/bin/python benchmarks/architectures.py    # 40 minutes on two cores; finished shapes are kept, the others begin anew
    .venv/bin/python benchmarks/architectures.py --minutes 0.1 --images 20 --drawn 40 --out runs/rehearsal.json

Every shape gets one core and one process, with the notebook's own training in preset `cpu`, and then three questions, because the loss alone
does not tell which images are good: noise MSE by noise level and accuracy on test images, and the distances of drawn images to the
test images, Frechet (plain) and kernel, as frechet.py measures them. The drawn images stay in runs/architectures/.
"""

import argparse
import functools
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import classifier
import frechet
import torch
import torch.nn.functional as F

nb = classifier.nb = frechet.nb  # one copy of the notebook's definitions
ROOT = frechet.ROOT
UNet = nb.UNet
SHAPES = {  # all near 1.1 GFLOP a pass
    "32, 96, 192 channels (the shipped shape)": {},
    "64, 64, 128: wide at full resolution": dict(widths=(64, 64, 128)),
    "32, 64, 192, 256: four levels": dict(widths=(32, 64, 192, 256), attention=(2, 3)),
    "112, 192 at half resolution, 2×2 pixels in one": dict(widths=(112, 192), attention=(1,)),
}
BANDS = 5


class Unshuffled(UNet):
    """A UNet that sees every 2×2 pixels as one with four times the channels, and answers in full resolution."""

    def __init__(self, config):
        c, h, w = config.image_shape
        super().__init__(nb.replace(config, image_shape=(4 * c, h // 2, w // 2)))
        self.config = config

    def forward(self, x_t, t, y):
        return F.pixel_shuffle(super().forward(F.pixel_unshuffle(x_t, 2), t, y), 2)


def one(name: str, args) -> dict:
    """Train and measure one shape, in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    nb.UNet = Unshuffled if "2×2" in name else UNet
    config = nb.make_config(
        "cpu", data_dir=str(ROOT / "data"), download=False, device="cpu", train_steps=10**6, cooldown=0.0,
        learning_rate=args.rate, ema_half_life=30, seed=args.seed, **SHAPES[name],
    )  # fmt: skip
    run = classifier.trained(config, nb.load_images(config, train=True), args.minutes)
    model, test = run.model, nb.load_images(config, train=False)
    some = test.subset(args.images, seed=1)
    guess = torch.cat([nb.classify(model, nb.to_unit(x), 4, 0.0).labels for x in some.images.split(20)])
    right = int((guess == some.labels).sum())
    dice, y = torch.Generator().manual_seed(args.seed), torch.arange(args.drawn) % config.num_classes
    drawn = torch.cat([nb.to_uint8(nb.sample(model, part, generator=dice)) for part in y.split(frechet.PART)])
    nb.write_whole(args.run_dir / f"{list(SHAPES).index(name)}.npy", functools.partial(frechet.store, drawn.numpy()))
    facts = dict(zip(("parameters", "work"), nb.describe(model).split(", ")))
    facts |= dict(seconds=round(run.seconds), steps=run.step, images_seen=run.images_seen, precision=config.precision)
    errors = nb.noise_mse(model, some, BANDS)
    mean, *around = nb.mean_interval(errors.mean(0))
    bands = [round(v, 5) for v in errors.mean(1).tolist()]
    facts |= dict(noise_mse=mean, noise_mse_interval=around, noise_mse_by_t=bands, test_images=len(some))
    facts |= dict(
        accuracy=right / len(some), interval=[round(v, 3) for v in nb.wilson(right, len(some))], evaluations=80
    )
    facts |= dict(frechet_plain=frechet.plain_distance(drawn, frechet.plain_reference(test, args.run_dir / "plain.pt")))
    facts |= dict(kernel=frechet.kernel_distances(test.subset(2000, seed=0).images, drawn)[0])
    return facts | dict(date=time.strftime("%Y-%m-%d"), source=some.source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="of training, each on one core")
    parser.add_argument("--images", type=int, default=100, help="test images for noise MSE and accuracy")
    parser.add_argument("--drawn", type=int, default=500, help="images drawn for the distances")
    parser.add_argument("--rate", type=float, default=1e-2, help="the learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "architectures")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "architectures.json")
    args = parser.parse_args()
    test = nb.load_images(nb.make_config("cpu", data_dir=str(ROOT / "data"), download=False), train=False)
    if "stand-in" in test.source:
        raise SystemExit("CIFAR-10 is missing in data/: the distance would be one to drawn images")
    args.run_dir.mkdir(parents=True, exist_ok=True)
    frechet.plain_reference(test, args.run_dir / "plain.pt")  # once, for every process
    asked = dict(minutes=args.minutes, learning_rate=args.rate, seed=args.seed, drawn=args.drawn, images=args.images)
    facts = json.loads(args.out.read_text()) if args.out.exists() else {}
    if any(facts.get(k) != v for k, v in asked.items()):
        facts = asked | dict(shapes={})
    left = [name for name in SHAPES if name not in facts["shapes"]]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for name, found in zip(left, pool.map(one, left, [args] * len(left))):
            facts["shapes"][name] = found
            nb.write_whole(
                args.out, lambda part: part.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
            )
            print(name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
