"""What a network evaluation buys in classification: every method on the same errors, measured once.

    python benchmarks/classifier.py errors --images 200 --rounds 100            # slow; goes on where it stopped
    python benchmarks/classifier.py errors --images 200 --rounds 100 --guided   # at the steps that `classify` takes
    python benchmarks/classifier.py errors --fresh --images 400 --rounds 32     # other images
    python benchmarks/classifier.py errors --fresh --images 400 --rounds 24 --guided
    python benchmarks/classifier.py baselines --minutes 5                       # goes on where it stopped
    python benchmarks/classifier.py diffusion --minutes 5                       # this network, trained for the same time
    python benchmarks/classifier.py earlier --weights runs/early.safetensors    # weights from less training
    python benchmarks/classifier.py report                                      # results/classifier.json and .png
    python benchmarks/classifier.py density                                     # where t should lie, on training images

`errors` stores, for test images, the squared error under all ten labels in many rounds: a step t anywhere in the
schedule, a noise and its negative, every second round on the mirror image; with --guided, the steps that the guide in
the weights file asks for, and no mirror images. Every method is then a choice among these numbers, so that all methods
see the same images, and pruning is the notebook's own `classify` with its network replaced by a look into the table.
The steps were chosen in view of the first 200 images; --fresh takes those after them, other noises, no mirror images,
and the report then says what uniform t needs to be as accurate, with 95 % intervals over images (the noises given). (The
way of dropping classes was chosen in view of both.)
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
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


SEEN = 200  # test images, the first of their order, in view of which the steps were chosen


def test_images(args, config) -> nb.ImageSet:
    """The test images of a table."""
    test, skip = nb.load_images(config, train=False), SEEN if args.fresh else 0
    some = test.subset(skip + args.images, seed=4)
    return nb.replace(some, images=some.images[skip:], labels=some.labels[skip:])


def prepare(args) -> None:
    """What one process of `errors` needs: one thread, the network and the images."""
    torch.set_num_threads(1)
    global config, model, some
    config, model = setting(args)
    some = test_images(args, config)


@torch.inference_mode()
def errors_of_round(r: int, t: int, seed: int, mirrored: bool) -> torch.Tensor:
    """(images, 2 signs, 10 classes) mean squared errors at step t."""
    x_0 = nb.to_unit(some.images.flip(3) if mirrored else some.images)
    image, label = torch.ones(len(x_0), 10).nonzero().T
    eps, found = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed)), []
    for noise in (eps, -eps):
        x_t = nb.q_sample(x_0, torch.full((len(x_0),), t), noise, nb.make_schedule(model.config))
        parts = zip(image.split(40), label.split(40))
        mse = [(model(x_t[i], torch.full_like(i, t), y) - noise).square().mean((1, 2, 3)) for i, y in parts]
        found.append(torch.cat(mse).view(-1, 10))
    return torch.stack(found, 1)


def errors(args) -> None:
    """(images, rounds, 2 signs, 10 classes) mean squared errors in runs/, a round a process and core."""
    config, model = setting(args)
    some, path = test_images(args, config), Path(args.out)
    table = torch.load(path) if path.exists() else dict(errors=torch.zeros(args.images, 0, 2, 10), seconds=0.0)
    same = table.setdefault("facts", model.facts["story"]) == model.facts["story"]
    same = same and all(table.setdefault(k, getattr(args, k)) == getattr(args, k) for k in ("guided", "fresh"))
    if args.guided:
        same = same and table.setdefault("guide", model.facts["guide"]) == model.facts["guide"]
    if len(table["errors"]) != args.images or not same:
        raise SystemExit(f"{path} is of other weights, steps or images: move it away")
    if args.guided:
        t = [step for step, *_ in nb.rounds_of(model.facts["guide"], args.rounds, config, 0)]
    else:
        t = [step_of_round(r, config.T) for r in range(args.rounds)]
    todo = range(table["errors"].shape[1], args.rounds)
    seed, mirrored = (5000 if args.guided else 1000) + 10_000 * args.fresh, not (args.guided or args.fresh)
    jobs = zip(*[(r, t[r], seed + r, mirrored and r % 2 == 1) for r in todo])
    processes, spawn, start = os.cpu_count() or 1, multiprocessing.get_context("spawn"), time.perf_counter()
    with ProcessPoolExecutor(processes, spawn, prepare, (args,)) as pool:
        for r, found in zip(todo, pool.map(errors_of_round, *jobs)):
            table["errors"] = torch.cat([table["errors"], found[:, None]], 1)
            table["seconds"] += time.perf_counter() - start
            start = time.perf_counter()
            table |= dict(labels=some.labels, source=some.source, t=t[: r + 1])
            nb.write_whole(path, functools.partial(torch.save, table))
            print(f"round {r + 1} of {args.rounds}, t = {t[r]}, {table['seconds']:.0f} s", flush=True)


SETTINGS = (
    (16, 0.05),
    (16, 0.1),
    (16, 0.02),
    (12, 0.05),
    (24, 0.03),
    (48, 0.03),
)  # (rounds, error_rate); the first is the default
ERROR_RATES = (0.45, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 3e-3, 1e-3, 1e-4, 1e-6, 0.0)
STARTS = 48  # every curve is the mean over so many starts of its sequence of steps, so that no single round decides


# ------------------------------------------------------------------------------------------------- methods


def nearest_unused(wanted, t: list, reach: float) -> list[int]:
    """For each wanted step the nearest of `t` that is not taken yet, if one lies within `reach`; indices into `t`."""
    left, taken = list(range(len(t))), []
    for step in wanted:
        if left and abs(t[best := min(left, key=lambda k: abs(t[k] - step))] - step) <= reach:
            left.remove(best)
            taken.append(best)
    return taken


def orders(guide: dict, t: list, reach: float = None) -> list[list[tuple[int, float]]]:
    """STARTS times (round, weight) as `classify` would visit steps, each step taken by the nearest unused round."""
    config, found = nb.make_config("smoke"), []
    reach = reach or 2 * max(1, guide["t"][-1] - guide["t"][0]) / len(t)
    for start in range(STARTS):
        wanted = [step for step, *_ in nb.rounds_of(guide, start + 4 * len(t), config, 0)[start:]]
        order = [(k, float(np.interp(t[k], guide["t"], guide["weight"]))) for k in nearest_unused(wanted, t, reach)]
        found.append(order)
    shortest = min(map(len, found))
    return [order[:shortest] for order in found]


def accuracies(pairs, found, labels) -> torch.Tensor:
    """(N, rounds): how often each image is right when rounds are added up, the mean over the orders in `found`."""
    accuracy = []
    for order in found:
        total = torch.stack([weight * pairs[:, r] for r, weight in order], 1).cumsum(1)
        accuracy.append((total.argmin(2) == labels[:, None]).float())
    return torch.stack(accuracy).mean(0)


def curve(pairs, found, labels, passes_a_round: int) -> list:
    """[(passes, accuracy)] when rounds are added up one after the other, the mean over the orders in `found`."""
    accuracy = accuracies(pairs, found, labels).mean(0)
    return [((k + 1) * passes_a_round, a) for k, a in enumerate(accuracy.tolist())]


def race(pairs, order, labels, guide, rounds: int, error_rate: float) -> nb.Classification:
    """The notebook's `classify`, its network replaced by the table."""
    rounds_of, errors_at = nb.rounds_of, nb.errors_at
    planned = [(r, weight, None) for r, weight in order[:rounds]]
    nb.rounds_of = lambda *_: planned
    nb.errors_at = lambda model, x_0, r, eps, rows, *_: pairs[rows[:, 0], r, rows[:, 1]]
    model = type("Table", (), {"config": nb.make_config("smoke")})()
    try:
        return nb.classify(model, torch.zeros(len(labels), 1), len(planned), error_rate, guide)
    finally:
        nb.rounds_of, nb.errors_at = rounds_of, errors_at


def raced(pairs, found, labels, guide, rounds: int, error_rate: float) -> dict:
    """Of every image (N,), the mean over the orders in `found`: cost, accuracy, and how far from the race that drops no class.

    And ece, a number: the expected calibration error, likewise.
    """
    rows, ece = [], []
    for order in found:
        verdict, full = (race(pairs, order, labels, guide, rounds, e) for e in (error_rate, 0.0))
        right, sure = (verdict.labels == labels).float(), verdict.scores.amax(1)
        group = (sure * 10).long().clamp(max=9)
        ece.append(sum((sure - right)[group == g].sum().abs() / len(right) for g in group.unique()).item())
        other = (verdict.labels != full.labels).float()
        rows.append(torch.stack([verdict.spent[:, -1].float(), right, (full.labels == labels).float(), other]))
    names = ("passes", "accuracy", "accuracy_without_dropping", "decisions_that_differ")
    return dict(zip(names, torch.stack(rows).mean(0).numpy()), ece=float(np.mean(ece)))


def races(pairs, found, labels, guide, rounds: int, error_rate: float) -> dict:
    """The same, means over the images."""
    rows = raced(pairs, found, labels, guide, rounds, error_rate)
    return dict(rounds=rounds, error_rate=error_rate, **{name: float(np.mean(row)) for name, row in rows.items()})


def pruned_curve(pairs, found, labels, guide, error_rate: float) -> list:
    """[(passes, accuracy)] of the race after every round, the mean over the orders in `found`."""
    rows = []
    for order in found:
        verdict = race(pairs, order, labels, guide, len(order), error_rate)
        right = (verdict.guesses == labels[:, None]).float().mean(0)
        rows.append(torch.stack([verdict.spent.float().mean(0), right], 1))
    return torch.stack(rows).mean(0).tolist()


def thinned(points: list) -> list:
    """About twenty points of a curve, evenly spread over the logarithm of the cost."""
    keep = sorted({round(k) for k in np.geomspace(1, len(points), 20)})
    return [dict(passes=points[k - 1][0], accuracy=round(points[k - 1][1], 4)) for k in keep]


def uniform_part(table: dict, guide: dict, config) -> dict:
    """What the table of evenly spread steps shows: curves without dropping, and every part of the method at equal cost."""
    pairs, labels, t = table["errors"].mean(2), table["labels"], table["t"]
    everywhere, middle = (orders(g, t) for g in (nb.even_guide(config, 0.0, 1.0), nb.even_guide(config)))
    guided = orders(guide, t)
    weighted = [[(r, float(np.interp(t[r], guide["t"], guide["weight"]))) for r, _ in order] for order in everywhere]
    even = [[(r, 1.0) for r, _ in order] for order in guided]
    chosen = {"uniform t": everywhere, "uniform t, weighted": weighted, "t from 0.08 T to 0.5 T": middle}
    same, single = {}, table["errors"].flatten(1, 2)  # (N, 2 rounds, 10): noises one by one
    split = [[(2 * r + k % 2, w) for k, (r, w) in enumerate(order)] for order in guided]  # of each pair one sign
    halves = [[[(2 * r + side, w) for r, w in order] for order in orders(guide, t[side::2])] for side in (0, 1)]
    for m in (4, 8, 16):  # at equal cost: 20 m passes
        rows = {"antithetic pairs": (pairs, guided, m), "single noises": (single, split, 2 * m)}
        rows |= {"no mirror images": (pairs, halves[0], m), "mirror images only": (pairs, halves[1], m)}
        rows |= {"even weights": (pairs, even, m), "uniform t": (pairs, everywhere, m)}
        rows = {name: (errors, some, k) for name, (errors, some, k) in rows.items() if k <= len(some[0])}
        same[f"{20 * m} passes"] = {
            n: round(curve(e, some, labels, 1)[k - 1][1], 4) for n, (e, some, k) in rows.items()
        }
    return dict(curves={n: thinned(curve(pairs, some, labels, 20)) for n, some in chosen.items()}, equal_cost=same)


def guided_part(table: dict, guide: dict, uniform: list) -> dict:
    """What the table of the guide's steps shows: the guided curve, the pruned ones, and settings in comparison."""
    pairs, labels, t = table["errors"].mean(2), table["labels"], table["t"]
    guided = orders(guide, t, reach=math.inf)  # the table has the guide's own density, so every step has its round
    pruned = {e: pruned_curve(pairs, guided, labels, guide, e) for e in ERROR_RATES}
    most, chosen = len(guided[0]), {"guided t": [[(r, 1.0) for r, _ in order] for order in guided]}
    chosen["guided t and weights"] = guided
    judged = [races(pairs, guided, labels, guide, min(k, most), e) for k, e in SETTINGS]
    for row in judged:
        wanted = next((p["passes"] for p in uniform if p["accuracy"] >= row["accuracy"]), None)
        if wanted:  # between the points that are kept of the curve
            wanted = float(np.interp(row["accuracy"], *([p[k] for p in uniform] for k in ("accuracy", "passes"))))
        row |= dict(uniform_passes_for_it=wanted, uniform_is_dearer=wanted and wanted / row["passes"])
    points = {e: [(round(c, 1), a) for c, a in rows] for e, rows in pruned.items()}
    curves = {f"at error rate {e:g}": thinned(points[e]) for e in (0.2, 0.05, 0.01)}
    curves[f"{most} rounds at most"] = [
        dict(passes=p[-1][0], accuracy=round(p[-1][1], 4), error_rate=e) for e, p in points.items()
    ]
    return dict(
        curves={n: thinned(curve(pairs, some, labels, 20)) for n, some in chosen.items()}, pruned=curves,
        settings=[{k: v and float(f"{v:.4g}") for k, v in row.items()} for row in judged],
    )  # fmt: skip


def needed(accuracy: float, curve: np.ndarray) -> float:
    """The evaluations at which uniform t is as accurate; `curve` (rounds,) after each round of 20. Infinite if not in it."""
    above = np.flatnonzero(curve >= accuracy)
    if not len(above) or above[0] == 0:
        return 20.0 if len(above) else math.inf
    k = above[0]
    return 20 * float(np.interp(accuracy, curve[k - 1 : k + 1], [k, k + 1]))


def fresh_part(even: dict, guided: dict, guide: dict, config, resamples: int = 2000) -> dict:
    """The settings on the images after SEEN, with 95 % intervals (bootstrap over images, noises given)."""
    if not torch.equal(even["labels"], guided["labels"]):
        raise SystemExit("the two tables of fresh images are of other images: make them with the same --images")
    if guided.get("guide", guide) != guide:
        raise SystemExit("the guide in the weights is not that of the table of fresh images: move the table away")
    pairs, labels = guided["errors"].mean(2), guided["labels"]
    orders_of = orders(guide, guided["t"], reach=math.inf)
    everywhere = orders(nb.even_guide(config, 0.0, 1.0), even["t"])
    uniform, settings = accuracies(even["errors"].mean(2), everywhere, labels).numpy(), []
    dice, n = np.random.default_rng(0), len(labels)
    drawn = [np.arange(n), *(dice.integers(n, size=n) for _ in range(resamples))]
    for rounds, error_rate in SETTINGS:
        if rounds * 3 > len(guided["t"]) * 2:  # else all starts would be the same rounds
            continue
        rows, found = raced(pairs, orders_of, labels, guide, rounds, error_rate), []
        for chosen in drawn:
            passes, accuracy, full = (
                rows[k][chosen].mean() for k in ("passes", "accuracy", "accuracy_without_dropping")
            )
            beside = uniform[chosen].mean(0)
            at_four = np.interp(4 * passes / 20, np.arange(len(beside)) + 1, beside, right=math.nan)  # not that long
            wanted = needed(accuracy, beside)
            found.append([passes, accuracy, accuracy - full, wanted, wanted / passes, accuracy - at_four])
        names = ("passes", "accuracy", "minus_without_dropping", "uniform_passes_for_it", "uniform_is_dearer",
                 "minus_uniform_at_four_times_the_cost")  # fmt: skip
        entry = dict(rounds=rounds, error_rate=error_rate, ece=round(rows["ece"], 4))
        for name, column in zip(names, np.array(found).T):
            low, high = np.sort(column)[[round(q * (len(column) - 1)) for q in (0.025, 0.975)]]
            values = [v if math.isfinite(v) else None for v in (column[0], low, high)]  # None: beyond uniform_limit
            entry[name] = [v and float(f"{v:.4g}") for v in values]
        settings.append(entry)
    curve = [(20 * (k + 1), float(a)) for k, a in enumerate(uniform.mean(0))]
    about = dict(images=n, guided_rounds=len(guided["t"]), uniform_limit=curve[-1][0])
    return about | dict(uniform=thinned(curve), settings=settings)


def report(args) -> None:
    """results/classifier.json and .png from the tables that are there; what the other one gave earlier stays."""
    config, model = setting(args)
    facts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if facts.get("weights") != model.facts["story"]:
        facts = dict(weights=model.facts["story"], **{k: facts.get(k, {}) for k in ("baselines", "earlier")})
    facts |= dict(starts=STARTS, device=config.device)
    curves, guide = facts.setdefault("curves", {}), model.facts["guide"]
    for name, file in (("uniform", "classifier.pt"), ("guided", "classifier-guided.pt")):
        if not (path := Path(args.out).with_name(file)).exists():
            continue
        table = torch.load(path)
        if table["facts"] != model.facts["story"]:
            raise SystemExit(f"{path} is of other weights: move it away")
        if name == "uniform":
            part = uniform_part(table, guide, config)
        else:
            if table.get("guide", guide) != guide:
                raise SystemExit(f"{path} was made with another guide: move it away")
            part = guided_part(table, guide, curves.get("uniform t", []))
        curves |= part.pop("curves")
        about = dict(images=len(table["labels"]), rounds=len(table["t"]), source=table["source"])
        facts |= part | {f"{name}_table": about | dict(date=time.strftime("%Y-%m-%d"))}
    fresh = [Path(args.out).with_name(f"classifier-fresh{end}.pt") for end in ("", "-guided")]
    if all(path.exists() for path in fresh):
        even, guided = (torch.load(path) for path in fresh)
        if not even["facts"] == guided["facts"] == model.facts["story"]:
            raise SystemExit(f"{fresh[0]} or {fresh[1]} is of other weights: move them away")
        facts["fresh"] = fresh_part(even, guided, guide, config) | dict(
            source=even["source"], date=time.strftime("%Y-%m-%d")
        )
    nb.write_whole(RESULTS, lambda part: part.write_text(json.dumps(facts, indent=1) + "\n"))
    draw(facts)
    print(json.dumps({k: v for k, v in facts.items() if k not in ("curves", "pruned")}, indent=1))


def draw(facts) -> None:
    fig, ax = nb.plt.subplots(figsize=(10, 4.8), layout="constrained")
    for (name, points), style in zip(facts["curves"].items(), ("o:", "s:", "^:", "v--", "d--")):
        ax.plot([p["passes"] for p in points], [p["accuracy"] for p in points], style, ms=4, lw=1, label=name)
    for (name, points), style in zip(facts.get("pruned", {}).items(), ("-", "-", "-", "k.-")):
        x, y = ([p[k] for p in points] for k in ("passes", "accuracy"))
        ax.plot(x, y, style, lw=1.8, label=f"guided and pruned, {name}")
    for (name, entry), ls in zip(facts["baselines"].items(), ("-.", "--", ":", (0, (5, 1)))):
        ax.axhline(entry["accuracy"], color="grey", ls=ls, lw=1.2, label=f"{name} (1 evaluation)")
    for name, entry in facts.get("earlier", {}).items():
        ax.plot(entry["evaluations_per_image"], entry["accuracy"], "P", color="grey", ms=8, label=name)
    ax.set(xscale="log", xlabel="network evaluations per image", ylabel="accuracy")
    images = (facts.get("guided_table") or facts["uniform_table"])["images"]
    ax.set_title(f"Accuracy against cost, {images} test images", fontsize=11)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    path = RESULTS.with_suffix(".png")
    nb.write_whole(path, lambda part: fig.savefig(part, format="png", dpi=90))


def density(args) -> None:
    """Accuracy on training images for steps t with density information**power: results/density.json.

    From the study that `shipped.py guide` leaves behind, one pair of noises at each of its steps, no class dropped. The
    guide is fitted on one half of the images and judged on the other, both ways round, from 24 starts each.
    """
    study, table = torch.load(args.out), {}
    errors, t, labels = study["errors"], study["t"].tolist(), study["labels"]
    half, counts = torch.arange(len(labels)) % 2, (2, 4, 6, 8, 10, 12)
    for power in (0, 0.5, 1, 2, 3, 4):
        found = {n: [] for n in counts}
        for side in (0, 1):
            guide = nb.fit_guide(errors[half == side], study["t"], labels[half == side])
            others, truth = errors[half != side], labels[half != side]
            grid = np.linspace(t[0], t[-1], 1000)
            share = np.cumsum(np.interp(grid, guide["t"], guide["information"]) ** power)
            for start in range(24):
                wanted = np.interp((start / 24 + np.arange(400) * 0.6180339887498949) % 1, share / share[-1], grid)
                order = nearest_unused(wanted, t, 2 * t[-1] / len(t))
                total = torch.stack([guide["weight"][k] * others[:, k] for k in order], 1).cumsum(1)
                for n in (n for n in counts if n <= len(order)):
                    found[n].append((total[:, n - 1].argmin(1) == truth).float().mean().item())
        k = errors.shape[2]
        table[f"information ** {power:g}"] = {2 * k * n: round(float(np.mean(v)), 4) for n, v in found.items() if v}
    facts = dict(images=len(labels), starts=24, **study["facts"], date=time.strftime("%Y-%m-%d"), accuracy=table)
    nb.write_whole(RESULTS.with_name("density.json"), lambda part: part.write_text(json.dumps(facts, indent=1) + "\n"))
    print(json.dumps(facts, indent=1))


# ----------------------------------------------------------------------------------------------- baselines


def small_cnn() -> nn.Module:
    layers, c = [], 3
    for width in (64, 128, 256):
        for stride in (1, 2):
            layers += [nn.Conv2d(c, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            c = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))


def fit(model, images, test, minutes: float, lr: float, path: Path, seed: int = 0) -> dict:
    """Cross-entropy and AdamW for `minutes` of computing, the learning rate falling linearly with the time that is left.

    Every minute everything is written to `path`, from where the same call goes on.
    """
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)
    spent, step, saved, date = 0.0, 0, 0.0, ""
    if path.exists():
        stored = torch.load(path)
        if stored["minutes"] != minutes:
            raise SystemExit(f"{path} is of a run of {stored['minutes']:g} minutes: move it away")
        model.load_state_dict(stored["model"])
        optimizer.load_state_dict(stored["optimizer"])
        spent, step, saved, date = (stored[k] for k in ("spent", "step", "spent", "date"))
    while spent < 60 * minutes:
        start = time.perf_counter()
        torch.manual_seed(seed + 1_000_003 * (step + 1))
        x_0, y = nb.batch_at(step, images, 128, seed)
        shift = [int(v) for v in torch.randint(-4, 5, (2,))]
        x_0 = F.pad(x_0, (4, 4, 4, 4), "reflect")[:, :, 4 + shift[0] : 36 + shift[0], 4 + shift[1] : 36 + shift[1]]
        for group in optimizer.param_groups:
            group["lr"] = lr * max(0.01, 1 - spent / (60 * minutes)) * min(1, (step + 1) / 50)
        loss = F.cross_entropy(model(x_0.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, spent = step + 1, spent + time.perf_counter() - start
        if spent - saved > 60 or spent >= 60 * minutes:
            saved, date = spent, time.strftime("%Y-%m-%d")
            state = dict(minutes=minutes, spent=spent, step=step, date=date)
            state |= dict(model=model.state_dict(), optimizer=optimizer.state_dict())
            nb.write_whole(path, functools.partial(torch.save, state))
            print(f"{path.stem}: minute {spent / 60:.0f} of {minutes:g}, loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(nb.to_unit(x)) for x in test.images.split(500)])
    right = int((logits.argmax(1) == test.labels).sum())
    low, high = nb.wilson(right, len(test))
    return dict(
        accuracy=right / len(test), interval=[round(low, 4), round(high, 4)], images=len(test), seconds=round(spent),
        images_seen=128 * step, parameters=sum(p.numel() for p in model.parameters()), date=date,
    )  # fmt: skip


def note(part: str, name: str, entry: dict) -> None:
    """One more entry in a part of results/classifier.json."""
    facts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    facts.setdefault(part, {})[name] = entry
    nb.write_whole(RESULTS, lambda file: file.write_text(json.dumps(facts, indent=1) + "\n"))
    print(name, json.dumps(entry), flush=True)


def baselines(args) -> None:
    """Networks that do nothing but classify, on all 10,000 test images."""
    config, _ = setting(args)
    images, test = (nb.load_images(config, train=part) for part in (True, False))
    for name, network, lr in (
        ("logistic regression on pixels", lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), 1e-3),
        ("small CNN", small_cnn, 3e-3),
    ):
        if args.only in name:
            torch.manual_seed(0)
            path = Path(args.out).with_name(f"{name.replace(' ', '-')}-{args.minutes:g}.pt")
            entry = fit(network(), images, test, args.minutes, lr, path)
            note("baselines", f"{name}, {args.minutes:g} min of training", entry)


def trained(config, images, minutes: float):
    """A run of `minutes`: half of the time at full learning rate, then as many steps again while it falls to zero."""
    run, alpha_bar = nb.new_run(config), nb.make_schedule(config)
    while run.seconds < 30 * minutes:
        nb.advance(run, images, alpha_bar, run.step + 1)
    run.config = nb.replace(config, train_steps=2 * run.step, cooldown=0.5)
    nb.advance(run, images, alpha_bar, run.config.train_steps)
    return run


def diffusion(args) -> None:
    """Train the notebook's network from nothing for --minutes, keep it in runs/, and measure it as `earlier` does."""
    path = Path(args.out).with_name(f"diffusion-{args.minutes:g}.safetensors")
    if not path.exists():
        config = nb.make_config(
            "cpu", data_dir=str(ROOT / "data"), download=False, train_steps=10**6, cooldown=0.0, seed=0,
            ema_half_life=max(10, round(6 * args.minutes)),
        )  # fmt: skip
        images = nb.load_images(config, train=True)
        run = trained(config, images, args.minutes)
        facts = dict(steps=run.step, images_seen=run.images_seen, seconds=round(run.seconds), data=images.source)
        facts |= dict(story=f"{run.images_seen:,} images in {run.step:,} steps, from {images.source}")
        run.model.config = nb.replace(config, data_dir="data", run_dir="runs")
        nb.save_weights(path, run.model, facts)
        print(facts, flush=True)
    args.weights = path
    earlier(args)


def earlier(args) -> None:
    """The diffusion model of --weights, say earlier in its training: 12 rounds, t evenly over the middle, no class dropped."""
    config, model = setting(args)
    some = nb.load_images(config, train=False).subset(args.images, seed=4)
    race = dict(rounds=12, error_rate=0.0, guide=nb.even_guide(config))
    verdict, seconds = nb.evaluate_classifier(model, some, Path(args.out).with_name("earlier.safetensors"), **race)
    n, facts = len(verdict.labels), model.facts
    right = int((verdict.labels == some.labels[:n]).sum())
    entry = dict(accuracy=right / n, interval=[round(v, 4) for v in nb.wilson(right, n)], images=n)
    entry |= dict(evaluations_per_image=verdict.evaluations, seconds=facts["seconds"], images_seen=facts["images_seen"])
    entry |= dict(weights=facts["story"], source=some.source, date=time.strftime("%Y-%m-%d"))
    note("earlier", f"diffusion, {facts['seconds'] / 60:.0f} min of training", entry)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("errors", "baselines", "diffusion", "earlier", "report", "density"))
    parser.add_argument("--weights", type=Path, default=ROOT / "assets" / "unet-cifar10.safetensors")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--only", default="", help="baselines with this in their name")
    parser.add_argument(
        "--guided", action="store_true", help="errors at the guide's steps, in runs/classifier-guided.pt"
    )
    parser.add_argument("--fresh", action="store_true", help=f"errors on the test images after the first {SEEN}")
    parser.add_argument(
        "--out", help="the table of errors, runs/classifier.pt; for density the study, runs/shipped/study.pt"
    )
    args = parser.parse_args()
    table = f"classifier{'-fresh' * args.fresh}{'-guided' * args.guided}.pt"
    args.out = args.out or str(ROOT / "runs" / ("shipped/study.pt" if args.command == "density" else table))
    globals()[args.command](args)


if __name__ == "__main__":
    main()
