"""Preset `gpu` on one GPU: how fast it trains, the run itself, and what the weights can do, each in one command.

    python benchmarks/gpu.py speed                       # images/s of the training step of preset `gpu`, compiled
    python benchmarks/gpu.py train --seconds 600         # as many steps as fit, or --steps; goes on where it stopped
    python benchmarks/gpu.py measure                     # guide, noise MSE, accuracy, images and their distance
    python benchmarks/gpu.py train --quick; python benchmarks/gpu.py measure --quick     # a rehearsal, also on a CPU

All of it is the notebook's own code with its preset `gpu`. What is found goes to RUN_DIR/found.json, the weights with it to
RUN_DIR/weights.safetensors. `measure` computes in fp32 (convolutions in TF32), as users without a GPU do.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import loader  # noqa: E402

nb = loader.load()
PART = 40  # images that share a seed, as in frechet.py


def configure(args, **more) -> "nb.Config":
    quick = (
        dict(widths=(16, 32), attention=(1,), batch_size=16, train_images=200, test_images=100, compile=True)
        if args.quick
        else {}
    )
    return nb.make_config(
        "gpu", data_dir=args.data_dir, run_dir=args.run_dir, download=False, seed=args.seed, batch_size=args.batch,
        learning_rate=args.rate, **more) if not quick else nb.make_config(
        "gpu", data_dir=args.data_dir, run_dir=args.run_dir, download=False, seed=args.seed, **quick, **more)  # fmt: skip


def tell(args, **found) -> None:
    """Print what was found and keep it, at once."""
    path = Path(args.run_dir) / "found.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    nb.write_whole(path, lambda part: part.write_text(json.dumps(known | found, indent=1) + "\n"))
    print(json.dumps(found), flush=True)


def machine(config) -> str:
    return torch.cuda.get_device_name() if "cuda" in config.device else config.device


def wait(config) -> float:
    if "cuda" in config.device:
        torch.cuda.synchronize()
    return time.perf_counter()


def speed(args, steps: int = 40) -> float:
    """Images per second of the notebook's train_step after warming up, on random images; compiling is told apart."""
    config = configure(args)
    run, alpha_bar, start = nb.new_run(config), nb.make_schedule(config).to(config.device), time.perf_counter()
    x = torch.rand(config.batch_size, *config.image_shape, device=config.device) * 2 - 1
    y = torch.arange(len(x), device=config.device) % config.num_classes
    if config.compile:
        nb.compile_in_place(run.network, x, y)
    for _ in range(3):
        nb.train_step(run, x, y, alpha_bar)
    ready = wait(config)
    for _ in range(steps):
        nb.train_step(run, x, y, alpha_bar)
    rate = steps * len(x) / (wait(config) - ready)
    memory = torch.cuda.max_memory_allocated() / 2**30 if "cuda" in config.device else 0.0
    facts = dict(
        images_per_s=round(rate, 1), batch=len(x), preparing_s=round(ready - start, 1), memory_gib=round(memory, 2)
    )
    tell(args, training_speed=facts | dict(device=machine(config), precision=config.precision, compiled=config.compile))
    return rate


def train(args) -> None:
    steps = args.steps or (40 if args.quick else None)
    if steps is None:
        rate = speed(args)
        seconds = args.until - time.time() if args.until else args.seconds
        steps = int(seconds * rate / args.batch)
        print(f"{steps} steps in {seconds:.0f} s, it seems", flush=True)
    config = configure(args, train_steps=steps, warmup=steps // 60 + 1, ema_half_life=steps // 60 + 1)
    images, weights, before = (
        nb.load_images(config, train=True).to(config.device),
        Path(args.run_dir) / "weights.safetensors",
        nb.keep,
    )

    def keep(path, run):  # with every checkpoint also the weights, so that a machine that goes away takes less with it
        before(path, run)
        hours = f"{run.seconds / 60:.1f} minutes on one {machine(config)}"
        facts = dict(images_seen=run.images_seen, steps=run.step, seconds=round(run.seconds), device=machine(config))
        facts |= dict(
            data=images.source, train_loss=round(float(np.mean(run.losses[-100:] or [0])), 5), torch=torch.__version__
        )
        facts |= dict(precision=config.precision, batch_size=config.batch_size, commit=args.commit)
        facts["story"] = (
            f"{run.images_seen:,} images in {run.step:,} steps of {config.batch_size} and {hours}, from {images.source}"
        )
        model = run.model
        model.config = nb.replace(config, data_dir="data", run_dir="runs")  # the folders here are nobody's business
        nb.save_weights(weights, model, facts)
        model.config = config
        print("\n" + facts["story"], flush=True)

    nb.keep = keep
    run = nb.train(config, images, resume=nb.checkpoint_path(config).exists())
    tell(
        args,
        training=dict(
            images_per_s=round(run.config.batch_size * run.step / run.seconds, 1),
            seconds=round(run.seconds),
            steps=run.step,
        ),
    )
    nb.write_whole(Path(args.run_dir) / "losses.npy", lambda part: store(np.array(run.losses, np.float32), part))


def store(array, path) -> None:
    with path.open("wb") as file:  # np.save would put .npy behind a name
        np.save(file, array)


def drawn(model, images: int, w: float, device: str) -> torch.Tensor:
    """uint8 (images, 3, 32, 32): those that frechet.py would draw, many of its parts at a time."""
    parts, one = [], nb.draw
    for start in range(0, images, 50 * PART):
        starts = range(start, min(images, start + 50 * PART), PART)
        noise = torch.cat(
            [one((PART, *model.config.image_shape), torch.Generator().manual_seed(10_000 + s), "cpu") for s in starts]
        )
        nb.draw = lambda shape, generator, device, noise=noise: noise.to(device)
        try:
            y = (torch.arange(PART) % model.config.num_classes).repeat(len(starts)).to(device)
            parts.append(nb.to_uint8(nb.sample(model, y, guidance_scale=w)).cpu())
        finally:
            nb.draw = one
    return torch.cat(parts)[:images]


def distance_to(test, device: str):
    """A function of uint8 images: their Frechet distance to `test` in the plain features of frechet.py, on `device`."""
    import frechet

    network = frechet.Features(plain=True).to(device)
    network.mean, network.std = network.mean.to(device), network.std.to(device)

    def features(images):
        return torch.cat([network(part.to(device)).cpu() for part in images.split(500)]).double().numpy()

    reference = features(test)
    mean, (values, vectors) = reference.mean(0), np.linalg.eigh(np.cov(reference, rowvar=False))
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T

    def distance(images) -> float:
        found = features(images)
        other = np.cov(found, rowvar=False)
        overlap = np.sqrt(np.linalg.eigvalsh(root @ other @ root).clip(0)).sum()
        return round(float(((found.mean(0) - mean) ** 2).sum() + values.sum() + np.trace(other) - 2 * overlap), 2)

    return distance


def measure(args) -> None:
    path, config = Path(args.run_dir) / "weights.safetensors", configure(args)
    device = config.device
    model = nb.load_weights(path, device)
    images, test = (nb.load_images(config, train=part).to(device) for part in (True, False))
    common = dict(
        weights=f"{model.facts['images_seen']:,} images seen",
        device=machine(config),
        date=time.strftime("%Y-%m-%d"),
        source=test.source,
    )
    some, start = images.subset(min(400, args.images), seed=5), wait(config)
    errors, t = nb.study_steps(model, some, 25, batch_size=1000)
    model.facts["guide"] = nb.fit_guide(errors, t, some.labels.cpu()) | {"source": some.source}
    tell(args, guide=model.facts["guide"] | dict(seconds=round(wait(config) - start, 1)))
    nb.save_weights(path, model, model.facts)
    nb.write_whole(
        Path(args.run_dir) / "study.pt",
        lambda part: torch.save(dict(errors=errors.half(), t=t, labels=some.labels.cpu()), part),
    )

    start, part = wait(config), test.subset(args.images, seed=2)
    verdict, seconds = nb.evaluate_classifier(
        model, part, Path(args.run_dir) / "classified.safetensors", rounds=16, error_rate=0.05
    )
    right, n = int((verdict.labels == part.labels.cpu()).sum()), len(verdict.labels)
    model.facts["test_accuracy"] = dict(
        value=right / n, images=n, interval=[round(v, 4) for v in nb.wilson(right, n)],
        evaluations_per_image=round(verdict.evaluations, 1), seconds=round(seconds, 1), rounds=16, error_rate=0.05, **common)  # fmt: skip
    tell(args, test_accuracy=model.facts["test_accuracy"])
    nb.save_weights(path, model, model.facts)

    start = wait(config)
    errors = nb.noise_mse(model, part)
    mean, *around = nb.mean_interval(errors.mean(0))
    model.facts["test_noise_mse"] = dict(
        value=mean, images=len(part), interval=around, seconds=round(wait(config) - start, 1), **common
    )
    seen = nb.noise_mse(model, images.subset(min(2000, args.images), seed=3))
    bands = [round(v, 6) for v in errors.mean(1).tolist()]
    tell(
        args,
        test_noise_mse=model.facts["test_noise_mse"] | dict(by_t=bands),
        train_noise_mse=nb.mean_interval(seen.mean(0)),
    )
    nb.save_weights(path, model, model.facts)

    distance, found = distance_to(test.images[: 10 * args.images], device), {}
    known = images.subset(args.images, seed=3).images
    found["real training images"] = distance(known)
    for w in args.guidance:
        start = wait(config)
        made = drawn(model, args.images, w, device)
        seconds = wait(config) - start
        nb.write_whole(Path(args.run_dir) / f"drawn-{w:g}.npy", lambda part, made=made: store(made.numpy(), part))
        found[f"guidance {w:g}"] = distance(made[torch.randperm(len(made), generator=torch.Generator().manual_seed(0))])
        tell(
            args,
            distances=found,
            **{
                f"drawing, guidance {w:g}": dict(
                    images=len(made), seconds=round(seconds, 2), images_per_s=round(len(made) / seconds, 1)
                )
            },
        )


def both(args) -> None:
    train(args)
    measure(args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("speed", "train", "measure", "both"))
    parser.add_argument("--run-dir", default=str(ROOT / "runs" / "gpu-run"))
    parser.add_argument("--data-dir", default=str(ROOT / "data"))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--until", type=float, help="seconds since 1970 at which training should end, not --seconds")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=nb.PRESETS["gpu"]["batch_size"])
    parser.add_argument("--rate", type=float, default=nb.PRESETS["gpu"]["learning_rate"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--commit", default="")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.images, args.guidance = 40, [1.0, 2.0]
    globals()[args.command](args)


if __name__ == "__main__":
    main()
