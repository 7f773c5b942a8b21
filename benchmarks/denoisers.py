"""The denoiser against classical ones, each tuned on training images: MSE, PSNR and SSIM on test images.

    .venv/bin/pip install -r benchmarks/requirements.txt
    python benchmarks/denoisers.py --images 500                        # goes on where it stopped
    python benchmarks/denoisers.py --only bm3d                         # a few methods; the others are kept

BM3D takes more than an hour for 500 images. Every method gets the same noisy images, neither clipped nor rounded, and the true
sigma; results are clamped to the range of pixels before they are measured. Writes results/denoisers.json and .png.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import loader  # noqa: E402

nb = loader.load()
RESULTS = ROOT / "benchmarks" / "results" / "denoisers.json"
SIGMAS = (5, 10, 15, 25, 50, 75, 100)


def bm3d(x, s, strength, profile):
    import bm3d as package

    return package.bm3d_rgb(x, strength * s, profile=profile)


CLASSICAL = {  # (function of an (H, W, 3) image in [0, 1] with noise s, grid of its settings)
    "non-local means": (
        lambda x, s, h, patch, reach: denoise_nl_means(x, patch, reach, h * s, sigma=s, channel_axis=2),
        dict(h=(0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0), patch=(3, 5, 7), reach=(3, 5, 7, 11)),
    ),
    "total variation": (
        lambda x, s, weight: denoise_tv_chambolle(x, weight * s, channel_axis=2),
        dict(weight=(0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0, 2.4, 2.9)),
    ),
    "wavelet": (
        lambda x, s, strength, method, wavelet, ycbcr: denoise_wavelet(
            x, strength * s, wavelet, method=method, convert2ycbcr=ycbcr, channel_axis=2
        ),
        dict(strength=(0.6, 0.8, 1.0, 1.25, 1.6), method=("BayesShrink", "VisuShrink"), wavelet=("db1", "db2", "sym4", "bior2.2"), ycbcr=(True, False)),
    ),
    "BM3D": (bm3d, dict(strength=(0.8, 1.0, 1.2, 1.5, 1.9), profile=("np",))),
}  # fmt: skip


def apply(name: str, noisy, s: float, options: dict):
    function = CLASSICAL[name][0]
    images = ((noisy + 1) / 2).permute(0, 2, 3, 1).numpy().astype(np.float64)
    clean = np.stack([function(image, s / 255, **options) for image in images])
    return torch.from_numpy(clean).permute(0, 3, 1, 2).float() * 2 - 1


def tuned(name: str, x_0, noisy, s: float) -> dict:
    """The settings with the highest PSNR on training images."""
    grid = CLASSICAL[name][1]
    choices = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    return max(choices, key=lambda o: nb.quality(apply(name, noisy, s, o), x_0)["PSNR"])


def network(name: str, model, noisy, s: float, y):
    y, dice = y if "label" in name else None, torch.Generator().manual_seed(0)
    labels = y.split(40) if y is not None else [None] * len(noisy)
    parts = zip(noisy.split(40), labels)
    return torch.cat([nb.denoise(model, x, s / 127.5, k, sampled="draw" in name, generator=dice) for x, k in parts])


def draw(facts) -> None:
    fig, axes = nb.plt.subplots(1, 3, figsize=(11, 4.4), layout="constrained")
    for ax, measure in zip(axes, ("PSNR", "SSIM", "MSE")):
        for name, rows in facts["methods"].items():
            style = "o-" if name.startswith("diffusion") else ("k:" if name == "noisy image" else "s--")
            points = [(int(s), row[measure]) for s, row in rows.items()]
            ax.plot(*zip(*points), style, ms=3, label=f"{name}, {next(iter(rows.values()))['images']} images")
        ax.set(xlabel="σ of the noise (of 255)", title=measure + " in dB" * (measure == "PSNR"))
        ax.grid(alpha=0.3)
    ax.set_yscale("log")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    path = RESULTS.with_suffix(".png")
    nb.write_whole(path, lambda part: fig.savefig(part, format="png", dpi=90))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=ROOT / "assets" / "unet-cifar10.safetensors")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--tuning", type=int, default=24)
    parser.add_argument("--only", default="", help="part of the names of the methods to measure")
    args = parser.parse_args()
    config = nb.make_config("cpu", data_dir=str(ROOT / "data"), download=False)
    model = nb.load_weights(args.weights, config.device, config.precision)
    test = nb.load_images(config, train=False).subset(args.images, seed=6)
    x_0, tuning = nb.to_unit(test.images), nb.to_unit(nb.load_images(config, True).subset(args.tuning, seed=3).images)
    names = [
        "noisy image",
        *CLASSICAL,
        "diffusion",
        "diffusion, label known",
        "diffusion, one draw",
        "diffusion, one draw, label known",
    ]
    facts = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if facts.get("weights") != model.facts["story"]:
        facts = dict(
            weights=model.facts["story"],
            methods={name: m for name, m in facts.get("methods", {}).items() if name in CLASSICAL},
        )
    facts |= dict(source=test.source, tuning_images=args.tuning, device=config.device)
    for name in (name for name in names if args.only.lower() in name.lower()):
        rows = facts["methods"].setdefault(name, {})
        for s in SIGMAS:
            if str(s) in rows and rows[str(s)]["images"] == len(x_0):
                continue
            dice = torch.Generator().manual_seed(s)
            noisy = x_0 + s / 127.5 * torch.randn(x_0.shape, generator=dice)
            options, start = {}, time.perf_counter()
            if name in CLASSICAL:
                few = tuning[: 8 if name == "BM3D" else None]
                options = tuned(name, few, few + s / 127.5 * torch.randn(few.shape, generator=dice), s)
                start = time.perf_counter()
                x = apply(name, noisy, s, options)
            else:
                x = noisy if name == "noisy image" else network(name, model, noisy, s, test.labels)
            row = {k: float(f"{v:.5g}") for k, v in nb.quality(x, x_0).items()}
            rows[str(s)] = row | dict(
                images=len(x_0),
                seconds=round(time.perf_counter() - start, 1),
                settings=options,
                date=time.strftime("%Y-%m-%d"),
            )
            nb.write_whole(RESULTS, lambda part: part.write_text(json.dumps(facts, indent=1, ensure_ascii=False)))
            print(
                f"{name:34} σ {s:3}: {row['PSNR']:.2f} dB, SSIM {row['SSIM']:.3f}, {len(x)} images, {rows[str(s)]['seconds']} s {options}",
                flush=True,
            )
    draw(facts)


if __name__ == "__main__":
    main()
