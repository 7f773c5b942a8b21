"""Accuracy of the diffusion classifier against network evaluations, and what ordinary classifiers reach.

    python benchmarks/classifier.py table --images 400      # errors under all labels, kept in parts; as often as stopped
    python benchmarks/classifier.py peers --minutes 20      # logistic regression and a small CNN, so long on this machine

`table` compares places for the rounds (one t with a pair +-eps, the same for all labels): those of the notebook, evenly in
log sigma; evenly in t from sigma 0.2 to 2; and evenly in t over the linear schedule of Ho et al., whose half lies above
sigma = 3.4. From each table both ways are read: all labels to the end, and the notebook's successive halving, which looks
its errors up.
"""

import hashlib
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from release import fingerprint, images_of, keep, loader, options, share

PART = 4


def places(nb, config, count: int) -> dict:
    """The steps of the rounds: the notebook's, and two that are evenly in t, `count` of them over the linear schedule."""
    alpha_bar = nb.make_schedule(config)
    number = (0.5 + 0.6180339887498949 * torch.arange(count, dtype=torch.float64)) % 1
    low, high = nb.step_of((0.2, 2.0), alpha_bar)
    linear = nb.linear_schedule(1000)
    sigma = ((1 - linear) / linear).sqrt()[(number * 1000).long()]
    return {
        "the notebook's rounds": nb.round_steps(config, nb.ROUNDS).tolist(),
        "evenly in t, σ 0.2 to 2": (low + number[: nb.ROUNDS] * (high - low)).round().long().tolist(),
        "evenly in the linear t": nb.step_of(sigma, alpha_bar).round().long().tolist(),
    }


def errors_of(nb, model, images, folder: Path, steps: list) -> torch.Tensor:
    """Errors (N, rounds, labels) of rounds at `steps`, kept in parts below `folder`."""
    found = []
    start = time.monotonic()
    key = hashlib.sha256(str(steps).encode()).hexdigest()[:8]
    for k in range(0, len(images), PART):
        file = folder / f"{key}-{k}.npy"
        if not file.exists():
            x_0 = nb.to_unit(images.images[k : k + PART])
            labels = torch.arange(model.config.num_classes, device=x_0.device).expand(len(x_0), -1)
            made = torch.stack([nb.label_errors(model, x_0, labels, t, r) for r, t in enumerate(steps)], 1)
            nb.write_whole(file, lambda part, made=made: np.save(open(part, "wb"), made.cpu().numpy()))
            print(f"{key}: {k + PART} images, {time.monotonic() - start:.0f} s", flush=True)
        found.append(np.load(file))
    return torch.from_numpy(np.concatenate(found))


def table(nb, args) -> dict:
    model = nb.load_weights(args.weights, args.device)
    test = images_of(nb, args, False)
    images = test.subset(args.images, seed=2).to(args.device)
    folder = Path(args.keep) / fingerprint(model)
    truth = images.labels.cpu()
    k = model.config.num_classes
    arms = {}
    for name, steps in places(nb, model.config, args.rounds).items():
        errors = errors_of(nb, model, images, folder, steps)
        every = torch.arange(k).expand(len(errors), -1)
        verdict = nb.successive_halving(lambda labels, r, e=errors: e[:, r].gather(1, labels), every)
        halved = share((verdict.labels == truth).numpy()) | {"evaluations": verdict.evaluations}
        whole = []
        for rounds in range(1, errors.shape[1] + 1):
            right = errors[:, :rounds].mean(1).argmin(1) == truth
            whole.append(share(right.numpy()) | {"evaluations": 2 * k * rounds})
        arms[name] = {"successive halving": halved, "all labels": whole}
    ours = arms["the notebook's rounds"]["successive halving"]
    rivals = arms["evenly in the linear t"]["all labels"]
    equal = next((r["evaluations"] for r in rivals if r["value"] >= ours["value"]), None)
    found = {"images": len(images), "images_seen": model.facts["images_seen"], "source": test.source}
    found["weights"] = folder.name
    return found | {"arms": arms, "linear t needs": equal or f"more than {rivals[-1]['evaluations']}"}


def small_cnn(classes: int) -> nn.Module:
    """Six convolutions with batch norm, 0.8 M parameters."""
    layers = []
    for c_in, width in ((3, 64), (64, 128), (128, 192)):
        for c in (c_in, width):
            layers += [nn.Conv2d(c, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))
    return net.to(memory_format=torch.channels_last)


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
    train, test = (images_of(nb, args, part).to(args.device) for part in (True, False))
    nets = {
        "logistic regression": (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), min(2, args.minutes), 1e-3),
        "small CNN": (small_cnn(10), args.minutes, 5e-3),
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
    plan = dict(weights="assets/unet-cifar10.safetensors", images=400, rounds=15, minutes=20.0, keep="runs/classifier")
    args = options(__doc__, "what", ("table", "peers"), **plan)
    keep(f"classifier-{args.what}", {"table": table, "peers": peers}[args.what](loader.load(), args))


if __name__ == "__main__":
    main()
