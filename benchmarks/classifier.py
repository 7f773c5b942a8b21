"""What a network evaluation buys in classification: every method on the same errors, measured once.

    python benchmarks/classifier.py errors --images 200 --rounds 100   # slow; goes on where it stopped
    python benchmarks/classifier.py baselines --minutes 5
    python benchmarks/classifier.py report                             # results/classifier.json and .png

`errors` stores, for test images, the squared error under all ten labels in many rounds: a step t anywhere in the
schedule, a noise and its negative, every second round on the mirror image. Every method is then a choice among these
numbers, so that all methods see the same images and the same noise, and pruning is the notebook's own `classify` with its
network replaced by a look into the table.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import loader  # noqa: E402

nb = loader.load()
RESULTS = ROOT / "benchmarks" / "results" / "classifier.json"


def setting(args):
    config = nb.make_config("cpu", data_dir=str(ROOT / "data"), download=False)
    return config, nb.load_weights(args.weights, config.device, config.precision)


def step_of_round(r: int, T: int) -> int:
    """Evenly over the schedule by the golden ratio, so that any first few rounds cover it."""
    return int(T * ((0.5 + r * 0.6180339887498949) % 1))


@torch.inference_mode()
def errors(args) -> None:
    """(images, rounds, 2 signs, 10 classes) mean squared errors in runs/, one round at a time."""
    config, model = setting(args)
    some = nb.load_images(config, train=False).subset(args.images, seed=4)
    path, alpha_bar = Path(args.out), nb.make_schedule(model.config)
    table = torch.load(path) if path.exists() else dict(errors=torch.zeros(args.images, 0, 2, 10), seconds=0.0)
    if len(table["errors"]) != args.images or table.setdefault("facts", model.facts["story"]) != model.facts["story"]:
        raise SystemExit(f"{path} is of other weights or another number of images: move it away")
    x_0 = nb.to_unit(some.images)
    image, label = torch.ones(len(x_0), 10).nonzero().T
    for r in range(table["errors"].shape[1], args.rounds):
        start, t = time.perf_counter(), step_of_round(r, config.T)
        eps, found = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1000 + r)), []
        for noise in (eps, -eps):
            x_t = nb.q_sample(x_0.flip(3) if r % 2 else x_0, torch.full((len(x_0),), t), noise, alpha_bar)
            parts = zip(image.split(40), label.split(40))
            mse = [(model(x_t[i], torch.full_like(i, t), y) - noise).square().mean((1, 2, 3)) for i, y in parts]
            found.append(torch.cat(mse).view(-1, 10))
        table["errors"] = torch.cat([table["errors"], torch.stack(found, 1)[:, None]], 1)
        table["seconds"] += time.perf_counter() - start
        table |= dict(labels=some.labels, source=some.source, t=[step_of_round(k, config.T) for k in range(r + 1)])
        nb.write_whole(path, functools.partial(torch.save, table))
        print(f"round {r + 1} of {args.rounds}, t = {t}, {table['seconds']:.0f} s", flush=True)


SETTINGS = (
    (12, 0.3),
    (24, 0.2),
    (48, 0.1),
    (10**6, 0.05),
)  # (rounds, error_rate), fixed before looking; the first is the notebook's


# ------------------------------------------------------------------------------------------------- methods


def nearest_rounds(guide: dict, t: list, allowed) -> list[tuple[int, float]]:
    """(round, weight) in the order in which `classify` would visit steps, each taken by the nearest unused round."""
    config, left, order = nb.make_config("smoke"), list(allowed), []
    reach = 2 * (guide["t"][-1] - guide["t"][0]) / len(t)
    for wanted, *_ in nb.rounds_of(guide, 4 * len(t), config, 0):
        if left and abs(t[best := min(left, key=lambda k: abs(t[k] - wanted))] - wanted) <= reach:
            left.remove(best)
            order.append((best, float(np.interp(t[best], guide["t"], guide["weight"]))))
    return order


def curve(pairs, order, labels, passes_a_round: int) -> list:
    """[(passes, right images)] when the rounds of `order` are added up one after the other."""
    total, points = torch.zeros_like(pairs[:, 0]), []
    for n, (r, weight) in enumerate(order, 1):
        total += weight * pairs[:, r]
        points.append((n * passes_a_round, (total.argmin(1) == labels).tolist()))
    return points


def race(pairs, order, labels, guide, rounds: int, error_rate: float) -> nb.Classification:
    """The notebook's `classify`, its network replaced by the table."""
    planned = [(r, weight, None) for r, weight in order[:rounds]]
    nb.rounds_of = lambda *_: planned
    nb.errors_at = lambda model, x_0, r, eps, rows, *_: pairs[rows[:, 0], r, rows[:, 1]]
    model = type("Table", (), {"config": nb.make_config("smoke")})()
    return nb.classify(model, torch.zeros(len(labels), 1), rounds=len(planned), error_rate=error_rate, guide=guide)


def thinned(points: list) -> list:
    """About twenty points of a curve, evenly spread over the logarithm of the cost; accuracy with its interval."""
    keep = sorted({round(k) for k in np.geomspace(1, len(points), 20)})
    rows = [(points[k - 1][0], sum(points[k - 1][1]), len(points[k - 1][1])) for k in keep]
    return [
        dict(passes=c, accuracy=round(k / n, 4), interval=[round(v, 3) for v in nb.wilson(k, n)]) for c, k, n in rows
    ]


def report(args) -> None:
    table, (config, model) = torch.load(args.out), setting(args)
    pairs, labels, t = table["errors"].mean(2), table["labels"], table["t"]
    single, n, rounds_of, errors_at = table["errors"], len(table["labels"]), nb.rounds_of, nb.errors_at
    guide = model.facts["guide"]
    everywhere = [(r, 1.0) for r in range(len(t))]
    middle = [(r, 1.0) for r in range(len(t)) if 0.08 <= t[r] / config.T <= 0.5]
    guided = nearest_rounds(guide, t, range(len(t)))
    by_weight = [(r, float(np.interp(t[r], guide["t"], guide["weight"]))) for r in range(len(t))]
    methods = {
        "uniform t": curve(pairs, everywhere, labels, 20),
        "uniform t, weighted": curve(pairs, by_weight, labels, 20),
        "t from 0.08 T to 0.5 T": curve(pairs, middle, labels, 20),
        "guided: t and weights": curve(pairs, guided, labels, 20),
    }
    pruned = {}
    for error_rate in (0.3, 0.1, 0.02, 0.005):
        points = []
        for rounds in sorted({round(k) for k in np.geomspace(1, len(guided), 12)}):
            verdict = race(pairs, guided, labels, guide, rounds, error_rate)
            points.append((verdict.evaluations, (verdict.labels == labels).tolist()))
        pruned[error_rate] = points
    nb.rounds_of, nb.errors_at = rounds_of, errors_at

    exhaustive = curve(pairs, guided, labels, 20)[-1]
    judged = []
    for rounds, error_rate in SETTINGS:
        nb.rounds_of, nb.errors_at = rounds_of, errors_at
        verdict = race(pairs, guided, labels, guide, rounds, error_rate)
        right, final = (verdict.labels == labels), torch.tensor(exhaustive[1])
        accuracy = right.float().mean().item()
        needed = next((c for c, k in methods["uniform t"] if sum(k) / n >= accuracy - 1e-9), None)
        group = (verdict.scores.amax(1) * 10).long().clamp(max=9)
        gaps = [
            (verdict.scores.amax(1)[group == g].mean() - right[group == g].float().mean()).abs() * (group == g).sum()
            for g in group.unique()
        ]
        judged.append(dict(
            rounds=min(rounds, len(guided)), error_rate=error_rate, passes=round(verdict.evaluations, 1), accuracy=round(accuracy, 4),
            ece=round(sum(gaps).item() / n, 4), uniform_passes_for_it=needed, uniform_is_dearer=needed and round(needed / verdict.evaluations, 2),
            below_exhaustive=round(sum(exhaustive[1]) / n - accuracy, 4), rightness_that_differs=round((right != final).float().mean().item(), 4),
        ))  # fmt: skip
    nb.rounds_of, nb.errors_at = rounds_of, errors_at

    same, straight = {}, [o for o in guided if o[0] % 2 == 0]
    for m in (4, 8, 16):  # at equal cost: 20 m passes
        signs = single.flatten(1, 2)  # (N, 2 rounds, 10): single noises, one sign from each of twice as many rounds
        other = [(2 * r + k % 2, w) for k, (r, w) in enumerate(guided)]
        same[f"{20 * m} passes"] = {
            "antithetic pairs": sum(curve(pairs, guided[:m], labels, 20)[-1][1]) / n,
            "single noises": sum(curve(signs, other[: 2 * m], labels, 10)[-1][1]) / n if len(guided) >= 2 * m else None,
            "no mirror images": sum(curve(pairs, straight[:m], labels, 20)[-1][1]) / n if len(straight) >= m else None,
            "even weights, same t": sum(curve(pairs, [(r, 1.0) for r, _ in guided[:m]], labels, 20)[-1][1]) / n,
        }
    facts = dict(
        images=n, rounds=len(t), source=table["source"], seconds=round(table["seconds"]), weights=model.facts["story"],
        device=config.device, date=time.strftime("%Y-%m-%d"),
        curves={name: thinned(points) for name, points in methods.items()},
        pruned={str(e): thinned(points) for e, points in pruned.items()}, equal_cost=same,
        exhaustive=dict(accuracy=sum(exhaustive[1]) / n, passes=exhaustive[0]), settings=judged,
    )  # fmt: skip
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    facts["baselines"] = old.get("baselines", {})
    nb.write_whole(RESULTS, lambda part: part.write_text(json.dumps(facts, indent=1)))
    draw(facts)
    print(json.dumps({k: v for k, v in facts.items() if k not in ("curves", "pruned")}, indent=1))


def draw(facts) -> None:
    fig, ax = nb.plt.subplots(figsize=(7, 4.4), layout="constrained")
    for (name, points), style in zip(facts["curves"].items(), ("o:", "s:", "^:", "d--")):
        ax.plot([p["passes"] for p in points], [p["accuracy"] for p in points], style, ms=4, label=name)
    for error_rate, points in facts["pruned"].items():
        if error_rate in ("0.3", "0.1", "0.02"):
            x, y = ([p[k] for p in points] for k in ("passes", "accuracy"))
            ax.plot(x, y, "-", lw=2, label=f"guided and pruned at error rate {error_rate}")
    for (name, entry), ls in zip(facts["baselines"].items(), ("-.", "--")):
        ax.axhline(
            entry["accuracy"], color="grey", ls=ls, lw=1, label=f"{name}, {entry['seconds'] / 60:.0f} min of training"
        )
    ax.set(xscale="log", xlabel="network evaluations per image", ylabel="accuracy")
    ax.set_title(f"Accuracy against cost, {facts['images']} test images", fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7)
    path = RESULTS.with_suffix(".png")
    nb.write_whole(path, lambda part: fig.savefig(part, format="png", dpi=90))


# ----------------------------------------------------------------------------------------------- baselines


def small_cnn() -> nn.Module:
    layers, c = [], 3
    for width in (64, 128, 256):
        for stride in (1, 2):
            layers += [nn.Conv2d(c, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            c = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


def fit(model, images, test, minutes: float, lr: float, seed: int = 0) -> dict:
    """Cross-entropy and AdamW for `minutes`, the learning rate falling linearly with the time that is left."""
    torch.manual_seed(seed)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    start, step = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < 60 * minutes:
        x_0, y = nb.batch_at(step, images, 128, seed)
        shift = [int(v) for v in torch.randint(-4, 5, (2,))]
        x_0 = F.pad(x_0, (4, 4, 4, 4), "reflect")[:, :, 4 + shift[0] : 36 + shift[0], 4 + shift[1] : 36 + shift[1]]
        for group in optimizer.param_groups:
            group["lr"] = lr * max(0.01, 1 - spent / (60 * minutes)) * min(1, (step + 1) / 50)
        loss = F.cross_entropy(model(x_0.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(nb.to_unit(x)) for x in test.images.split(500)])
    right = int((logits.argmax(1) == test.labels).sum())
    low, high = nb.wilson(right, len(test))
    return dict(
        accuracy=right / len(test), interval=[round(low, 4), round(high, 4)], images=len(test), seconds=round(spent),
        images_seen=128 * step, parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip


def baselines(args) -> None:
    """Networks that do nothing but classify, on all 10,000 test images."""
    config, _ = setting(args)
    images, test = (nb.load_images(config, train=part) for part in (True, False))
    found = {
        "logistic regression on pixels": fit(
            nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), images, test, args.minutes, 1e-3
        ),
        "small CNN": fit(small_cnn(), images, test, args.minutes, 3e-3),
    }
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    nb.write_whole(RESULTS, lambda part: part.write_text(json.dumps(old | {"baselines": found}, indent=1)))
    print(json.dumps(found, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("errors", "baselines", "report"))
    parser.add_argument("--weights", type=Path, default=ROOT / "assets" / "unet-cifar10.safetensors")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--out", default=str(ROOT / "runs" / "classifier.pt"))
    args = parser.parse_args()
    globals()[args.command](args)


if __name__ == "__main__":
    main()
