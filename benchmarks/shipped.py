"""How assets/unet-cifar10.safetensors and assets/standin.png are made and measured, with the notebook's own functions.

    python benchmarks/shipped.py train --steps 5000 --cooldown 0.5     # goes on where it stopped; Ctrl-C is safe
    python benchmarks/shipped.py guide runs/shipped/weights.safetensors --images 200    # what each t knows of the class
    python benchmarks/shipped.py measure runs/shipped/weights.safetensors --images 1000
    python benchmarks/shipped.py renew runs/early.safetensors          # from git show c4f34f2:assets/unet-cifar10.safetensors
    python benchmarks/shipped.py optimizers --run-dir runs/optimizers   # Muon against AdamW in the notebook's own training
    python benchmarks/shipped.py standin runs/shipped/weights.safetensors
    python benchmarks/shipped.py hero                                  # the picture at the top of notebook and README
    python benchmarks/shipped.py readme                                # README's numbers, from assets/results.json
    python benchmarks/shipped.py tidy                                  # the executed notebook without traces of progress

`train` starts from the shipped weights (from nothing with --scratch). `guide` writes the study of timesteps, on training
images, into the metadata of the weights file; `measure` test accuracy and noise MSE.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import loader  # noqa: E402

nb = loader.load()
SHIPPED = ROOT / "assets" / "unet-cifar10.safetensors"


def configure(args) -> "nb.Config":
    shape = {} if args.widths is None else dict(widths=tuple(map(int, args.widths.split(","))))
    return nb.make_config(
        "cpu", run_dir=args.run_dir, data_dir=str(ROOT / "data"), batch_size=64, learning_rate=args.rate, warmup=50,
        ema_half_life=args.half_life, train_steps=args.steps, cooldown=args.cooldown, seed=args.seed, download=False,
        snr_power=args.snr_power, **shape,
    )  # fmt: skip


def train(args) -> None:
    """The notebook's train(), from the shipped weights or from nothing, and the sum of both stories in the metadata."""
    config = configure(args)
    start = None if args.scratch else nb.load_weights(SHIPPED).requires_grad_(True)
    images = nb.load_images(config, train=True)
    run = nb.train(config, images, init=start, resume=True)
    before = {} if start is None else start.facts
    facts = {name: before.get(name, 0) + more for name, more in (("steps", run.step), ("seconds", round(run.seconds)))}
    facts["images_seen"] = run.images_seen  # those before included
    facts |= dict(device=config.device, data=images.source, torch=torch.__version__, commit=args.commit)
    facts |= dict(train_loss=round(float(np.mean(run.losses[-100:])), 5), train_loss_is="noise MSE / SNR ** snr_power")
    facts["story"] = (
        f"{facts['images_seen']:,} images in {facts['steps']:,} steps of {config.batch_size} and "
        f"{facts['seconds'] / 60:.0f} minutes (waiting included) on two shared CPU cores, from {images.source}"
    )
    shipped = (
        [2940, 5440, 8340] if before else []
    )  # the ends of the runs behind the shipped weights, older than this record
    facts["run_ends"] = [*before.get("run_ends", shipped), facts["steps"]]
    facts["story"] += "; the last layer estimates v since step 2,140" if before else ""
    facts["story"] += f"; the learning rate fell to zero at steps {', '.join(f'{n:,}' for n in facts['run_ends'])}"
    facts["precisions"] = [*before.get("precisions", ["fp32"] * len(facts["run_ends"][:-1])), config.precision]
    for start, precision, one_before in zip(facts["run_ends"], facts["precisions"][1:], facts["precisions"]):
        facts["story"] += f"; computed in {precision} since step {start:,}" if precision != one_before else ""
    facts["snr_powers"] = [*before.get("snr_powers", [0.0] * len(facts["run_ends"][:-1])), config.snr_power]
    if any(facts["snr_powers"]):
        facts["story"] += f", with snr_power {', '.join(f'{p:g}' for p in facts['snr_powers'])}"
    run.model.config = nb.replace(config, data_dir="data", run_dir="runs")  # the folders here are nobody's business
    nb.save_weights(Path(args.run_dir) / "weights.safetensors", run.model, facts)
    print(facts["story"])


def guide(args) -> None:
    """What each t knows about the class, on training images, stored in the weights: classification is guided by it."""
    model, config = nb.load_weights(args.weights), configure(args)
    some, start = nb.load_images(config, train=True).subset(args.images, seed=5), time.perf_counter()
    errors, t = nb.study_steps(model, some, 25)
    model.facts["guide"] = nb.fit_guide(errors, t, some.labels) | {"source": some.source}
    study = dict(errors=errors, t=t, labels=some.labels, facts=dict(source=some.source, weights=model.facts["story"]))
    nb.write_whole(Path(args.run_dir) / "study.pt", lambda part: torch.save(study, part))
    nb.save_weights(args.weights, model, model.facts)
    print(json.dumps(model.facts["guide"]), f"{time.perf_counter() - start:.0f} s")


def renew(args) -> None:
    """Older weights in git, in place, under the names that parameters have now; those without `output` estimate eps."""
    with nb.safe_open(args.weights, "pt") as file:
        metadata, tensors = file.metadata(), {n.replace(".block.", "."): file.get_tensor(n) for n in file.keys()}
    metadata["config"] = json.dumps({"output": "eps"} | json.loads(metadata["config"]))
    nb.write_whole(args.weights, lambda part: nb.save_file(tensors, part, metadata))
    print(nb.load_weights(args.weights).facts["story"])


def measure(args) -> None:
    """Accuracy with its interval and noise MSE on test images, printed and stored beside the weights."""
    model, config = nb.load_weights(args.weights), configure(args)
    test = nb.load_images(config, train=False)
    some = test.subset(args.images, seed=2)
    race = dict(
        rounds=16, error_rate=0.05
    )  # the defaults: within half a point of the race without dropping (classifier.py)
    verdict, seconds = nb.evaluate_classifier(model, some, Path(args.run_dir) / "classified.safetensors", **race)
    n = len(verdict.labels)
    right = int((verdict.labels == some.labels[:n]).sum())
    few, start = test.subset(args.images, seed=1), time.perf_counter()
    errors = nb.noise_mse(model, few)
    mean, *around = nb.mean_interval(errors.mean(0))
    common = dict(
        source=some.source,
        weights=f"{model.facts['images_seen']:,} images seen",
        device=config.device,
        date=time.strftime("%Y-%m-%d"),
    )
    model.facts["test_noise_mse"] = dict(
        value=mean, images=len(few), interval=around, seconds=round(time.perf_counter() - start), **common
    )
    model.facts["test_accuracy"] = dict(
        value=right / n, images=n, interval=[round(v, 4) for v in nb.wilson(right, n)],
        evaluations_per_image=round(verdict.evaluations, 1), seconds=round(seconds), **race, **common,
    )  # fmt: skip
    nb.save_weights(args.weights, model, model.facts)
    print(json.dumps({k: model.facts[k] for k in ("test_noise_mse", "test_accuracy")}), errors.mean(1).tolist())


def optimizers(args) -> None:
    """The notebook's minute of training with Muon and with AdamW at several learning rates: results/optimizers.json."""
    config = nb.make_config("cpu", data_dir=str(ROOT / "data"), download=False)
    images, few = nb.load_images(config, train=True), nb.load_images(config, train=False).subset(300, seed=1)
    found = []
    for name, rate in (("muon", 2.5e-3), ("muon", 5e-3), ("muon", 1e-2), *(("adamw", r * 1e-3) for r in (1, 2, 4, 8))):
        chosen = nb.replace(config, optimizer=name, learning_rate=rate, run_dir=f"{args.run_dir}/{name}-{rate}")
        run = nb.train(chosen, images, resume=True)
        if run.step < chosen.train_steps:
            raise SystemExit("stopped: the same command goes on")
        entry = dict(
            optimizer=name, learning_rate=rate, test_noise_mse=round(nb.noise_mse(run.model, few).mean().item(), 5)
        )
        found.append(entry | dict(images_seen=run.images_seen, seconds=round(run.seconds)))
        print(found[-1], flush=True)
    facts = dict(test_images=len(few), source=few.source, device=config.device, date=time.strftime("%Y-%m-%d"))
    path = ROOT / "benchmarks" / "results" / "optimizers.json"
    nb.write_whole(path, lambda part: part.write_text(json.dumps(facts | {"runs": found}, indent=1) + "\n"))


def draw_images(model, per_class: int, guidance_scale: float, seed: int) -> torch.Tensor:
    """uint8 (10 * per_class, 3, 32, 32), sorted by class, in batches that a CPU's cache likes."""
    y, dice = torch.arange(model.config.num_classes).repeat_interleave(per_class), torch.Generator().manual_seed(seed)
    parts = [nb.sample(model, part, guidance_scale=guidance_scale, generator=dice) for part in y.split(40)]
    return nb.to_uint8(torch.cat(parts))


def standin(args) -> None:
    """Ten rows of one class each, 48 images a row."""
    images = draw_images(nb.load_weights(args.weights), 48, 3.0, seed=321)
    sheet = images.view(10, 48, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(320, 48 * 32, 3)
    path = ROOT / "assets" / "standin.png"
    nb.write_whole(path, lambda part: nb.Image.fromarray(sheet.numpy()).save(part, "PNG", optimize=True))


def hero(args) -> None:
    """One photograph on its way into noise, and one image on its way out of it."""
    model, config = nb.load_weights(args.weights), configure(args)
    images, alpha_bar, dice = (
        nb.load_images(config, train=True),
        nb.make_schedule(config),
        torch.Generator().manual_seed(4),
    )
    x_0 = nb.to_unit(images.images[nb.first_of_each(images, 6)[-1:]])
    noise, t = torch.randn(x_0.shape, generator=dice), torch.linspace(0, 0.5 * config.T, 12).long()
    out = nb.q_sample(x_0.expand(12, -1, -1, -1), t, noise, alpha_bar)
    x_0, trace = nb.sample(model, torch.tensor([8]), 20, "ddim", 3.0, generator=dice, return_trajectory=True)
    stops = np.linspace(len(trace) // 3, len(trace) - 1, 11).round().astype(int)
    nb.plt.rcParams.update({"font.size": 9, "figure.constrained_layout.use": True})
    fig, ax = nb.plt.subplots(figsize=(9, 1.7))
    nb.image_axis(
        ax, torch.cat([out, *[trace[i][1] for i in stops], x_0]), 12, row_names=["into noise →", "out of it →"]
    )
    path = ROOT / "assets" / "hero.png"
    nb.write_whole(path, lambda part: fig.savefig(part, format="png", dpi=80, pil_kwargs={"optimize": True}))


def frechet_table(found: dict) -> list[str]:
    """How near drawn images are to the training images, the nearest first."""
    rows = {name: value for name, value in found.items() if "images" in name and isinstance(value, float)}
    plain = {name: found.get(f"{name}, plain [distance, low, high]") for name in rows}  # see frechet.py
    shown = {name: f"{v[0]:.1f} ({v[1]:.1f} to {v[2]:.1f})" if v else "" for name, v in plain.items()}
    return [
        "",
        f"Fréchet distance of {found['images']:,} images to the {found['reference_images']:,} training images, in the features of an "
        "EfficientNet-Lite0 (not the FID of the literature, and too large with so few images: see `benchmarks/README.md`), and to "
        "the test images in its plain features (with 95 % intervals, where measured):",
        "",
        "| images | distance | plain, to test images |",
        "|---|---|---|",
        *(f"| {name} | {value:.1f} | {shown[name]} |" for name, value in sorted(rows.items(), key=lambda row: row[1])),
    ]


def readme(args) -> None:
    """Write the numbers of assets/results.json between the two marks in README.md."""
    report = json.loads((ROOT / "assets" / "results.json").read_text(encoding="utf-8"))
    results, facts = report["results"], report["training"]
    entry, checked = results["accuracy"], facts["test_accuracy"]
    low, high = (f"{100 * v:.1f}" for v in entry["interval"])
    lines = [
        f"The shipped weights saw {facts['story']}. One run of the notebook, on {report['config']['device']} in "
        f"{report['config']['precision']}, measured with them:",
        "",
        "| measure | value | images | |",
        "|---|---|---|---|",
        f"| accuracy | {100 * entry['value']:.1f} % | {entry['images']:,} | {low} to {high} % (95 %), "
        f"{entry['evaluations_per_image']} evaluations an image, {entry['seconds']:.0f} s |",
    ]
    for name, note in (
        ("test noise MSE, shipped weights", "mean over all noise levels"),
        ("sampling, images/s", "20 steps, guided"),
    ):
        lines.append(f"| {name} | {results[name]['value']:.4g} | {results[name]['images']:,} | {note} |")
    sigmas = results["PSNR, noisy image"]["sigma"]
    lines += [
        "",
        "PSNR in dB of denoised test images, by σ of 255:",
        "",
        "| method | images | " + " | ".join(map(str, sigmas)) + " |",
    ]
    lines.append("|---|---|" + "---|" * len(sigmas))
    for name, entry in results.items():
        if name.startswith("PSNR, "):
            row = " | ".join(f"{v:.2f}" for v in entry["value"])
            lines.append(f"| {name.removeprefix('PSNR, ')} | {entry['images']} | {row} |")
    low, high = (f"{100 * v:.1f}" for v in checked["interval"])
    lines += [
        "",
        f"The same weights on {checked['images']:,} test images: {100 * checked['value']:.1f} % right (95 % interval {low} to "
        f"{high} %) with {checked['evaluations_per_image']} evaluations an image ({checked['rounds']} rounds at most, error rate "
        f"{checked['error_rate']}), in {checked['seconds']:,} s ({checked.get('note', 'no pauses')}); this stands in "
        "the metadata of the weights file and in `results.json`.",
    ]
    if "frechet_distance" in facts:
        lines += frechet_table(facts["frechet_distance"])
    path = ROOT / "README.md"
    before, _, rest = path.read_text(encoding="utf-8").partition("<!-- results -->\n")
    after = rest.partition("<!-- end of results -->")[2]
    text = before + "<!-- results -->\n" + "\n".join(lines) + "\n<!-- end of results -->" + after
    nb.write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def tidy(args) -> None:
    """Join what each cell printed piece by piece, keep the last state of progress bars, drop the times of execution."""
    import nbformat

    notebook = nbformat.read(loader.NOTEBOOK, 4)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata.pop("execution", None)
        joined = []
        for output in cell.outputs:
            if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
                joined[-1].text += output.text
            else:
                joined.append(output)
        for output in (output for output in joined if output.output_type == "stream"):
            output.text = "\n".join(line.rsplit("\r", 1)[-1] for line in output.text.split("\n"))
        cell.outputs = [output for output in joined if output.output_type != "stream" or output.text.strip()]
    nb.write_whole(loader.NOTEBOOK, lambda part: nbformat.write(notebook, part))


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it otherwise
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "command",
        choices=("train", "guide", "renew", "measure", "optimizers", "standin", "hero", "readme", "tidy"),
    )
    parser.add_argument("weights", nargs="?", type=Path, default=SHIPPED)
    parser.add_argument("--run-dir", default=str(ROOT / "runs" / "shipped"))
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--cooldown", type=float, default=0.5)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--half-life", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--snr-power", type=float, default=0.0)
    parser.add_argument("--scratch", action="store_true")
    parser.add_argument("--widths", help="channels at full, half, quarter ... resolution, as 64,64,128; with --scratch")
    parser.add_argument("--commit", default="")
    parser.add_argument("--images", type=int, default=1000)
    args = parser.parse_args()
    globals()[args.command](args)


if __name__ == "__main__":
    main()
