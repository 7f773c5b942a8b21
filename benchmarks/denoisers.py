"""The denoiser against classical ones, each tuned on training images: PSNR and SSIM on test images.

    python benchmarks/denoisers.py --images 500                 # goes on where it stopped
    python benchmarks/denoisers.py --images 500 --only BM3D     # one method; BM3D takes 80 minutes of one core

Every method gets the same noisy images, neither clipped nor rounded, and the true sigma.
"""

import json
import time

import bm3d
import numpy as np
import torch
from release import RESULTS, fingerprint, images_of, loader, options
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle

KEPT = RESULTS / "denoisers.json"
STRENGTHS = (0.3, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2, 1.4, 1.7, 2.0)


def methods(nb, model) -> dict:
    """Name: (function of a batch, sigma and a strength, strengths to try, on how many training images)."""
    one = bm3d.BM3DProfile()
    one.num_threads = 1  # twice as fast on one core, and the same to six digits
    some = {
        "non-local means": lambda x, s, k: denoise_nl_means(x, 3, 7, k * s, sigma=s, channel_axis=2),
        "total variation": lambda x, s, k: denoise_tv_chambolle(x, k * s, channel_axis=2),
        "BM3D": lambda x, s, k: bm3d.bm3d_rgb(x, k * s, one),
    }
    found = {"noisy image": (lambda noisy, sigma, k: noisy, (), 0)}
    for name, filtered in some.items():
        found[name] = (nb.classical(filtered), STRENGTHS, 24)
        if name == "BM3D":  # slow, and made for the true sigma
            found[name] = (nb.classical(filtered), (0.85, 1.0, 1.2), 4)
    dice = torch.Generator()
    found["diffusion, one draw"] = (
        lambda noisy, sigma, k: nb.denoise(model, noisy, sigma, draw_steps=10, generator=dice.manual_seed(0)),
        (),
        0,
    )
    found["diffusion, mean"] = (lambda noisy, sigma, k: nb.denoise(model, noisy, sigma), (), 0)
    return found


def main() -> None:
    plan = dict(weights="assets/unet-cifar10.safetensors", images=500, only="")
    args = options(__doc__, **plan)
    nb = loader.load()
    model = nb.load_weights(args.weights)
    test = images_of(nb, args, False).subset(args.images, seed=6)
    tuning = nb.to_unit(images_of(nb, args, True).subset(24, seed=3).images)
    sha = fingerprint(model)
    facts = json.loads(KEPT.read_text()) if KEPT.exists() else {"methods": {}}
    if facts.get("weights") != sha:  # what does not depend on the weights is kept
        facts["methods"] = {name: rows for name, rows in facts["methods"].items() if "diffusion" not in name}
    facts |= {"weights": sha, "images_seen": model.facts["images_seen"], "source": test.source}
    for name, (method, strengths, few) in methods(nb, model).items():
        rows = facts["methods"].setdefault(name, {})
        x_0 = nb.to_unit(test.images)
        for s in nb.SIGMAS if args.only in name else ():
            if rows.get(str(s), {}).get("images") == len(x_0):
                continue
            sigma = s / 127.5
            noisy = x_0 + sigma * torch.randn(x_0.shape, generator=torch.Generator().manual_seed(s))
            x = tuning[:few]
            noisy_x = x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 + s))
            tried = [nb.quality(method(noisy_x, sigma, k), x)[0] for k in strengths]
            best = strengths[int(np.argmax(tried))] if tried else None
            start = time.perf_counter()
            cleaned = torch.cat([method(part, sigma, best) for part in noisy.split(50)])
            seconds = time.perf_counter() - start
            psnr, ssim = nb.quality(cleaned, x_0)
            rows[str(s)] = {"PSNR": round(psnr, 2), "SSIM": round(ssim, 4), "images": len(x_0)}
            rows[str(s)] |= {"strength": best, "seconds": round(seconds, 1)}
            text = json.dumps(facts, indent=1)
            nb.write_whole(KEPT, lambda part, text=text: part.write_text(text + "\n"))
            print(f"{name:20} sigma {s:3}: {psnr:.2f} dB, SSIM {ssim:.3f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
