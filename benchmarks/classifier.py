"""Accuracy of the diffusion classifier against network evaluations, and what ordinary classifiers reach.

    python benchmarks/classifier.py table --images 400      # errors under all labels, kept in parts; as often as stopped
    python benchmarks/classifier.py peers --minutes 20      # logistic regression and a small CNN, so long on this machine

`table` compares two places for the rounds (one t with a pair +-eps, the same for all labels): those of the notebook, and
uniform in t over the linear schedule of Ho et al., whose half lies above sigma = 3.4. From each table both ways are read:
all labels to the end, and the notebook's successive halving, which looks its errors up.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.stats import binomtest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import loader

ROOT = Path(__file__).resolve().parent.parent

PART = 4


def share(right: np.ndarray) -> dict:
    """Accuracy and its 95 % interval (Wilson) from right answers."""
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    return {"value": round(float(right.mean()), 4), "interval": [round(interval.low, 4), round(interval.high, 4)]}


def uniform_steps(nb, config, count: int) -> list[int]:
    """Steps of the config's schedule with the noise of steps that are uniform in the linear schedule's t."""
    linear = nb.linear_schedule(1000)
    number = (0.5 + 0.6180339887498949 * torch.arange(count, dtype=torch.float64)) % 1
    sigma = ((1 - linear) / linear).sqrt()[(number * 1000).long()]
    return nb.step_of(sigma, nb.make_schedule(config)).round().long().tolist()


def tables(nb, model, images, folder: Path, places: dict) -> dict:
    """Errors (N, rounds, labels) for every place of the rounds, kept in parts below `folder`."""
    found = {name: [] for name in places}
    start = time.monotonic()
    for k in range(0, len(images), PART):
        file = folder / f"{k}.npz"
        if not file.exists():
            x_0 = nb.to_unit(images.images[k : k + PART])
            labels = torch.arange(model.config.num_classes, device=x_0.device).expand(len(x_0), -1)
            made = {}
            for name, steps in places.items():
                errors = [nb.label_errors(model, x_0, labels, t, r) for r, t in enumerate(steps)]
                made[name] = torch.stack(errors, 1).cpu().numpy()
            nb.write_whole(file, lambda part, made=made: np.savez(open(part, "wb"), **made))
            print(f"{k + PART} images, {time.monotonic() - start:.0f} s", flush=True)
        stored = np.load(file)
        for name in places:
            found[name].append(stored[name])
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in found.items()}


def table(nb, args) -> dict:
    model = nb.load_weights(args.weights, args.device)
    test = nb.load_images(nb.make_config("cpu", device=args.device, data_dir=args.data, download=False), False)
    images = test.subset(args.images, seed=2).to(args.device)
    sha = hashlib.sha256(Path(args.weights).read_bytes()).hexdigest()[:12]
    places = {
        "the notebook's rounds": nb.round_steps(model.config, nb.ROUNDS).tolist(),
        "uniform in the linear t": uniform_steps(nb, model.config, args.rounds),
    }
    found = tables(nb, model, images, Path(args.keep) / sha, places)
    truth = images.labels.cpu()
    k = model.config.num_classes
    arms = {}
    for name, errors in found.items():
        every = torch.arange(k).expand(len(errors), -1)
        verdict = nb.successive_halving(lambda labels, r, e=errors: e[:, r].gather(1, labels), every)
        halved = share((verdict.labels == truth).numpy()) | {"evaluations": verdict.evaluations}
        whole = []
        for rounds in range(1, errors.shape[1] + 1):
            right = errors[:, :rounds].mean(1).argmin(1) == truth
            whole.append(share(right.numpy()) | {"evaluations": 2 * k * rounds})
        arms[name] = {"successive halving": halved, "all labels": whole}
    ours = arms["the notebook's rounds"]["successive halving"]
    rivals = arms["uniform in the linear t"]["all labels"]
    equal = next((r["evaluations"] for r in rivals if r["value"] >= ours["value"]), None)
    return {
        "images": len(images),
        "images_seen": model.facts["images_seen"],
        "source": test.source,
        "weights": sha,
        "arms": arms,
        "uniform needs": equal or f"more than {rivals[-1]['evaluations']}",
    }


class SmallCNN(nn.Sequential):
    """Six convolutions with batch norm, 0.7 M parameters."""

    def __init__(self, classes: int):
        layers = []
        c = 3
        for width in (64, 128, 192):
            for _ in range(2):
                layers += [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                c = width
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


def fit(nb, net, train, minutes: float, rate: float, size: int = 128) -> int:
    """Train with AdamW, mirrored and shifted images, the rate falling to 0 over the time; returns images seen."""
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    start = time.monotonic()
    step = 0
    while (left := 1 - (time.monotonic() - start) / (60 * minutes)) > 0:
        x_0, y = nb.batch_at(step, train, size, 0)
        down, right = torch.randint(9, (2,)).tolist()
        x_0 = F.pad(x_0, (4, 4, 4, 4), mode="reflect")[:, :, down : down + 32, right : right + 32]
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 50, left * 1.5)
        loss = F.cross_entropy(net(x_0.contiguous(memory_format=torch.channels_last)), y, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    return step * size


def peers(nb, args) -> dict:
    torch.manual_seed(0)
    config = nb.make_config("cpu", device=args.device, data_dir=args.data, download=False)
    train, test = (nb.load_images(config, part).to(args.device) for part in (True, False))
    nets = {
        "logistic regression": (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), min(2, args.minutes), 1e-3),
        "small CNN": (SmallCNN(10).to(memory_format=torch.channels_last), args.minutes, 5e-3),
    }
    found = {}
    for name, (net, minutes, rate) in nets.items():
        net.to(args.device)
        seen = fit(nb, net, train, minutes, rate)
        net.eval()
        with torch.inference_mode():
            guess = torch.cat([net(nb.to_unit(part)).argmax(1) for part in test.images.split(500)])
        found[name] = share((guess == test.labels).cpu().numpy()) | {"minutes": minutes, "images_seen": seen}
        found[name]["parameters"] = sum(p.numel() for p in net.parameters())
        print(name, found[name], flush=True)
    return {"images": len(test), "source": test.source, "threads": torch.get_num_threads(), "peers": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table", "peers"))
    parser.add_argument("--weights", default="assets/unet-cifar10.safetensors")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15, help="rounds uniform in the linear t")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", default="data")
    parser.add_argument("--keep", default="runs/classifier")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {"table": table, "peers": peers}[args.what](loader.load(), args)
    path = ROOT / "benchmarks" / "results" / f"classifier-{args.what}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
