"""Train the shipped weights, and make everything anew that shows them.

python benchmarks/release.py train --init FILE   # a plateau in runs/plateau: from weights, or from nothing without --init
python benchmarks/release.py train               # goes on from its checkpoint, as often as it is stopped (Ctrl-C)
python benchmarks/release.py fall --out FILE     # a branch: 200 steps with the rate falling to 0; the plateau stays
python benchmarks/release.py all                 # executes the notebook, and makes assets and README's tables anew
python benchmarks/release.py readme              # the tables only
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbclient
import nbformat
import numpy as np
import torch
from scipy.stats import binomtest

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import loader

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIGMAS = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def options(doc: str, what: str = "", choices=None, /, **defaults):
    """The command line of a script: what to do, options with their defaults, and three that all scripts have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if what:
        parser.add_argument(what, choices=choices)
    every = dict(device="cuda" if torch.cuda.is_available() else "cpu", threads=torch.get_num_threads(), data="data")
    for name, default in (defaults | every).items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", default=default, type=type(default) if default is not None else str)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def images_of(nb, args, train: bool):
    """The training or test images in --data."""
    return nb.load_images(nb.make_config("cpu", device="cpu", data_dir=args.data, download=False), train)


def share(right) -> dict:
    """The accuracy of right answers, with its 95 % interval (Wilson)."""
    count = int(np.sum(right))
    interval = binomtest(count, len(right)).proportion_ci(method="wilson")
    return {"value": round(count / len(right), 4), "interval": [round(interval.low, 4), round(interval.high, 4)]}


def keep(name: str, found: dict) -> None:
    """Write and print a result."""
    text = json.dumps(found, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)


def plateau(nb, args):
    """Settings that train the gpu preset's network at a constant rate, and what the weights it began from had seen."""
    config = nb.make_config("gpu", device=args.device, batch_size=args.batch, learning_rate=args.rate, run_dir=args.run)
    config = nb.replace(config, warmup=20, cooldown=0.0, ema_half_life=200, train_steps=10**9)
    story = Path(args.run) / "facts.json"
    if not nb.checkpoint_path(config).exists():
        facts = nb.load_weights(args.init).facts if args.init else {"images_seen": 0, "steps": 0, "seconds": 0}
        nb.write_whole(story, lambda part: part.write_text(json.dumps(facts)))
    facts = json.loads(story.read_text())
    facts.pop("measured", None)  # of the weights it began from
    return nb.replace(config, seed=facts["images_seen"]), facts


def train(nb, args) -> None:
    config, _ = plateau(nb, args)
    path = nb.checkpoint_path(config)
    init = nb.load_weights(args.init) if args.init and not path.exists() else None
    run = nb.train(config, images_of(nb, args, True).to(args.device), init=init, resume=path.exists())
    nb.save_checkpoint(path, run)


def fall(nb, args) -> None:
    config, facts = plateau(nb, args)
    path = nb.checkpoint_path(config)
    run = nb.load_checkpoint(path, config)
    test = images_of(nb, args, False).subset(500, seed=9).to(args.device)
    until = run.step + args.steps
    before = {"images_seen": facts["images_seen"] + run.images_seen, "learning_rate": args.rate}
    before |= slopes(nb, run.model, test)
    branch = nb.replace(config, run_dir=f"{args.run}/fall-{run.step}", train_steps=until, cooldown=args.steps / until)
    branch = nb.replace(branch, ema_half_life=30)
    if not nb.checkpoint_path(branch).exists():
        nb.write_whole(nb.checkpoint_path(branch), lambda part: shutil.copy(path, part))
    images = images_of(nb, args, True)
    run = nb.train(branch, images.to(args.device), resume=True)
    nb.save_checkpoint(nb.checkpoint_path(branch), run)
    if run.step == until:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        rate = f"{facts.get('rate', '')}; on at {args.rate:g}, and falling to 0 over the last {args.steps} steps"
        made = facts | {"data": images.source, "rate": rate.strip("; "), "steps": facts["steps"] + run.step}
        made |= {
            "images_seen": facts["images_seen"] + run.images_seen,
            "seconds": facts["seconds"] + round(run.seconds),
        }
        made |= {"plateau": [*facts.get("plateau", []), before], "fallen": slopes(nb, run.model, test)}
        nb.save_weights(args.out, run.model, made | {"commit": commit.stdout.strip(), "torch": torch.__version__})
        print(f"{args.out}: {made}")


def fingerprint(model) -> str:
    """Of the weights alone: what `measure.py --store` adds to their file does not change it."""
    whole = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(whole).hexdigest()[:12]


def slopes(nb, model, images) -> dict:
    """The slope of eps_hat by sigma, as section 5 of the notebook measures it."""
    sigma = (1 / nb.make_schedule(model.config) - 1).sqrt()
    t = torch.stack([(sigma - s).abs().argmin() for s in SIGMAS])
    mse, slope = nb.noise_errors(model, images, t)
    found = {"sigma": SIGMAS, "slope": [round(v, 4) for v in slope.tolist()]}
    return found | {"mse": [round(v, 5) for v in mse.mean(1).tolist()]}


def standin(nb, columns: int = 36) -> None:
    """assets/standin.png: images drawn by the shipped weights, a row for every class."""
    model = nb.load_weights(ROOT / "assets" / "unet-cifar10.safetensors")
    dice = torch.Generator().manual_seed(0)
    rows = []
    for k in range(10):
        x_0 = nb.sample(model, torch.full((columns,), k), 20, guidance_scale=3.0, generator=dice)
        rows.append(nb.to_uint8(x_0).permute(2, 0, 3, 1).reshape(32, -1, 3))
    sheet = nb.Image.fromarray(torch.cat(rows).numpy())
    nb.write_whole(ROOT / "assets" / "standin.png", lambda part: sheet.save(part, format="PNG", optimize=True))


def interval(entry: dict, scale: float = 1.0, digits: int = 1) -> str:
    low, high = entry["interval"]
    return f"{scale * low:.{digits}f} to {scale * high:.{digits}f}"


def readme() -> None:
    """README's table, from results.json and what `measure.py` has stored in the weights."""
    results = json.loads((ROOT / "assets" / "results.json").read_text(encoding="utf-8"))
    facts, found = results["training"], results["results"]
    seen = facts["images_seen"]
    measured = dict(facts.get("measured", {}))
    if (RESULTS / f"measure-{seen}.json").exists():
        measured |= json.loads((RESULTS / f"measure-{seen}.json").read_text())
    rows = []
    if "accuracy" in measured:
        a = measured["accuracy"]
        text = f"{a['images']:,} test images, {a['evaluations']} evaluations each"
        rows.append(("classification accuracy", f"{100 * a['value']:.1f} % ({interval(a, 100)})", text))
    real = measured.get("FD of real images")
    for name, what, best in (
        ("FD", "Fréchet distance (EfficientNet, not FID)", f"; real training images {real}" * bool(real)),
        ("KID", "kernel distance × 1000", "; 0 for images of the same distribution"),
    ):
        if name in measured:
            entry, drawn = measured[name], measured["drawn"]
            value = f"{entry['value']:.1f}" + (f" ({interval(entry)})" if "interval" in entry else "")
            rows.append((what, value, f"{drawn['images']:,} images, guidance {drawn['guidance']:g}{best}"))
    rows.append(("test noise MSE", f"{measured['noise_mse']:.4f}", "500 test images at ten noise levels"))
    methods = json.loads((RESULTS / "denoisers.json").read_text())["methods"]
    best = [[methods[name][s]["PSNR"] for s in ("25", "50")] for name in ("diffusion, mean", "BM3D")]
    ours, rival = (", ".join(f"{psnr:.1f}" for psnr in pair) for pair in best)
    text = f"{methods['BM3D']['25']['images']} test images; BM3D, the best classical method: {rival} dB"
    rows.append(("denoising, σ = 25, 50 of 255", f"{ours} dB", text))
    speed = found["sampling, images/s"]
    text = f"{speed['setting']}, {results['config']['device']}, {results['config']['precision']}"
    rows.append(("sampling", f"{speed['value']:.1f} images/s", text))
    source = found["test noise MSE"]["source"]
    lines = [f"The shipped weights saw {seen:,} images. 95 % intervals in brackets. All but the last row are"]
    lines += [f"measured in `benchmarks/`. Source: {source}.", ""]
    lines += ["| measure | value | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    put(ROOT / "README.md", "results", lines)
    for name, table in TABLES.items():
        files = sorted(RESULTS.glob(f"{name}*.json"), key=lambda file: (len(file.stem), file.stem))  # 2 before 10
        rows = [row for file in files for row in table(json.loads(file.read_text()))]
        if rows:
            head = [rows[0], ["---"] * len(rows[0])]
            body = [row for row in rows[1:] if row != rows[0]]
            put(ROOT / "benchmarks" / "README.md", name, [f"| {' | '.join(map(str, row))} |" for row in (*head, *body)])


def progress() -> None:
    """assets/progress.png: what measure.py has found, against images seen, and images drawn from the same noise."""
    files = [file for file in RESULTS.glob("measure-*.json") if file.with_suffix(".png").exists()]
    found = [json.loads(file.read_text()) | {"file": file} for file in files]
    points = {point["images_seen"]: point for point in sorted(found, key=lambda point: point["images_seen"])}
    fig = plt.figure(figsize=(8.5, 2.4 + 1.75 * len(points)), layout="constrained", dpi=110)
    curves, grids = fig.subfigures(2, 1, height_ratios=(2.4, 1.75 * len(points)))
    for ax, name in zip(curves.subplots(1, 3), ("KID", "accuracy", "noise_mse")):
        some = {seen: point[name] for seen, point in points.items() if name in point}
        some = {seen: entry if isinstance(entry, dict) else {"value": entry} for seen, entry in some.items()}
        values = np.array([entry["value"] for entry in some.values()])
        ends = np.array([entry.get("interval", [entry["value"]] * 2) for entry in some.values()]).reshape(-1, 2).T
        ax.errorbar(list(some), values, abs(ends - values), fmt="o:", ms=4, capsize=3)
        ax.set(xlabel="images seen", xscale="log", title={"noise_mse": "test noise MSE"}.get(name, name))
        ax.set(yscale="log" if name == "KID" else "linear")
        ax.set_xticks([1e4, 1e5, 1e6], ["10k", "100k", "1M"])
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    for ax, (seen, point) in zip(np.atleast_1d(grids.subplots(len(points), 1)), points.items()):
        ax.imshow(plt.imread(point["file"].with_suffix(".png")), interpolation="none")
        ax.set_title(f"{seen:,} images seen", fontsize=9, loc="left")
        ax.axis("off")
    fig.savefig(ROOT / "assets" / "progress.png", pil_kwargs={"optimize": True})


def put(path: Path, name: str, lines: list[str]) -> None:
    """Replace what stands between the marks of `name` in a Markdown file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
    after = rest.partition(f"<!-- end of {name} -->")[2]
    made = "\n".join([f"{before}<!-- {name} -->", *lines, f"<!-- end of {name} -->{after}"])
    path.write_text(made, encoding="utf-8")


# The tables of benchmarks/README.md: what a file of results/ becomes, its head first.
def on(f) -> str:
    m = f["machine"]
    return f"{m['device']}, {m['threads']} threads, {m['precision']}{', fast in bf16' * m['fast in bf16']}"


def ratio(row) -> str:
    return f"{row['ratio']:.2f} ({row['range'][0]:.2f} to {row['range'][1]:.2f})"


def peer_rows(f):
    yield "machine", "network", "GFLOP", "training, images/s", "slower in training", "a GFLOP", "evaluating", "sampling"
    for name, net in f["networks"].items():
        train, evaluate, sample = (f["tasks"][task][name] for task in ("train", "evaluate", "sample"))
        rate = f"{train['images_per_second']:.1f} ({train['share_of_peak']:.0%} of peak)"
        ratios = [ratio(train), f"{train['ratio_per_gflop']:.2f}", ratio(evaluate), ratio(sample)]
        yield on(f), f"{name}, {net['million_parameters']:.1f} M", net["gflop"], rate, *ratios


def profile_rows(f):
    yield "machine", *f["shares"]
    yield on(f), *[f"{share:.0%}" for share in f["shares"].values()]


def scale_rows(f):
    yield "machine", *[f"{name}" for name in f["images_per_second"]]
    yield on(f), *[f"{rate:.1f} images/s" for rate in f["images_per_second"].values()]


def classifier_rows(f):
    yield "rounds", "labels", "evaluations", "accuracy", "95 %"
    for place, arms in f["arms"].items():
        for row in (arms["successive halving"], *arms["all labels"][4:10:5]):
            labels = "halved" if row is arms["successive halving"] else "all"
            yield place, labels, row["evaluations"], f"{row['value']:.1%}", interval(row, 100)


def peer_classifier_rows(f):
    yield "trained to classify", "parameters", "minutes", "accuracy", "95 %"
    for name, row in f["peers"].items():
        yield name, f"{row['parameters']:,}", row["minutes"], f"{row['value']:.1%}", interval(row, 100)


def denoiser_rows(f):
    sigmas = list(f["methods"]["noisy image"])
    yield "PSNR in dB, SSIM", "images", *[f"σ = {s}" for s in sigmas]
    for name, rows in f["methods"].items():
        cells = [f"{rows[s]['PSNR']:.1f}, {rows[s]['SSIM']:.2f}" if s in rows else "" for s in sigmas]
        yield name, *{row["images"] for row in rows.values()}, *cells


def measure_rows(f):
    yield "images seen", "noise MSE", "slope, least and greatest", "accuracy, %", "FD", "KID", "images drawn"
    a = f.get("accuracy")
    accuracy = f"{100 * a['value']:.1f} ({interval(a, 100)}) of {a['images']:,}" if a else ""
    slope = f"{min(f['slope']):.3f}, {max(f['slope']):.3f}"
    distances = [f"{f[name]['value']:.1f} ({interval(f[name])})" for name in ("FD", "KID")]
    yield f"{f['images_seen']:,}", f["noise_mse"], slope, accuracy, *distances, f"{f['drawn']['images']:,}"


def race_rows(f):
    first = next(iter(f["arms"].values()))
    setting = f"{first['minutes']:g} minutes on {on(first)}; {first['images']:,} images of each"
    yield setting, "images seen", "KID", "FD"
    for name, arm in f["arms"].items():
        distances = [f"{arm[d]['value']:.0f} ({interval(arm[d], digits=0)})" for d in ("KID", "FD")]
        yield name, f"{arm['images_seen']:,}", *distances


def recipe_rows(f):
    yield "on", "minutes", "part", "images seen", "KID"
    for name, arm in f["arms"].items():
        machine = on(arm) if "machine" in arm else f["on"]
        spread = f" ({interval(arm['KID'], digits=0)})" if "interval" in arm["KID"] else ""
        minutes = f"{arm['minutes']:g}" if "minutes" in arm else ""
        part = name.removesuffix(", guidance 2")
        yield machine, minutes, part, f"{arm['images_seen']:,}", f"{arm['KID']['value']:.0f}{spread}"


TABLES = {"peers": peer_rows, "profile": profile_rows}
TABLES |= {"scale": scale_rows, "classifier-table": classifier_rows, "classifier-peers": peer_classifier_rows}
TABLES |= {"denoisers": denoiser_rows, "measure": measure_rows, "race": race_rows, "recipe": recipe_rows}


def remake() -> None:
    """Execute the notebook in place, and make anew what README and the next run show."""
    standin(loader.load())
    progress()
    path = ROOT / "DiffusionModel.ipynb"
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(ROOT)}}
    options = dict(timeout=None, kernel_name="python3", coalesce_streams=True, resources=where)
    nbclient.NotebookClient(notebook, **options).execute()
    nbformat.write(notebook, path)
    for name in ("figures/reverse.gif", "figures/generated-classes.png", "results.json"):
        shutil.copy(ROOT / "runs" / name, ROOT / "assets")
    readme()


def main() -> None:
    commands = {"train": train, "fall": fall, "all": remake, "readme": readme}
    plan = dict(init="", run="runs/plateau", rate=2e-3, batch=128, steps=200, out="runs/fallen.safetensors")
    args = options(__doc__, "what", tuple(commands), **plan)
    if args.what in ("train", "fall"):
        commands[args.what](loader.load(), args)
    else:
        commands[args.what]()


if __name__ == "__main__":
    main()
