"""Speed, as ratios within one run: what is compared takes turns, and medians over the rounds are quoted.

python benchmarks/speed.py step --threads 1      # a training step: this and the first edition's
python benchmarks/speed.py peers                 # training, sampling, evaluating: against diffusers and denoising-diffusion-pytorch
python benchmarks/speed.py growth                # cost against batch, width, image side, steps and images
python benchmarks/speed.py profile               # where the time of a training step goes
python benchmarks/speed.py scale                 # one and two processes
python benchmarks/speed.py race --arm notebook   # equal time, one arm a call (ARMS), nothing else running; then without --arm
python benchmarks/speed.py recipe --arm adamw    # the recipe's parts in the same way (PARTS)
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import loader

ROOT = Path(__file__).resolve().parent.parent


FIRST_EDITION = "1fbe517"
CLASSES = 10


def first_edition():
    """The first edition's definitions, from git."""
    path = ROOT / "runs" / "first-edition.ipynb"
    path.parent.mkdir(exist_ok=True)
    show = ["git", "show", f"{FIRST_EDITION}:DiffusionModel.ipynb"]
    path.write_bytes(subprocess.run(show, cwd=ROOT, check=True, capture_output=True).stdout)
    return loader.load(path, "first_edition")


def trainer(nb, device: str, precision: str, batch: int, **settings):
    """A function that takes one training step of the gpu preset's network on random images, and its run."""
    config = nb.make_config("gpu", device=device, precision=precision, batch_size=batch, **settings)
    run = nb.new_run(config)
    for p in (p for p in run.network.parameters() if not p.any()):
        nn.init.normal_(p, std=0.02)  # as after some training: gradients of zeros are slow on a CPU
    alpha_bar = nb.make_schedule(config)
    alpha_bar = alpha_bar.cuda() if device == "cuda" else alpha_bar
    x_0 = torch.rand(batch, *config.image_shape, device=device) * 2 - 1
    y = torch.arange(batch, device=device) % CLASSES
    if device == "cuda":
        run.forward = nb.compiled(run.forward, x_0, y)
    return lambda: nb.train_step(run, x_0, y, alpha_bar), run


# ------------------------------------------------------------------------- the peers, as libraries and as tutorials
@dataclass
class Peer:
    """A peer's network, its answer eps_hat to (x_t, t, y), the loss it trains on, and its schedule."""

    net: nn.Module
    eps: callable
    loss: callable
    alpha_bar: torch.Tensor
    optimizer: torch.optim.Optimizer
    average: callable  # takes a step of the moving average
    averaged: callable  # puts it in place of the weights
    sampler: callable = None  # (batch, steps): its own


def switches(net, args, switched: bool):
    """The net with the notebook's switches or as it is, and the context in which it computes."""
    cast = functools.partial(torch.autocast, args.device, torch.bfloat16, enabled=switched and args.precision == "bf16")
    net = net.to(args.device)
    if switched:
        net = net.to(memory_format=torch.channels_last)
    if switched and args.device == "cuda":
        net.compile()
    return net, cast


def same_shape() -> dict:
    """The settings of UNet2DModel that make the notebook's network."""
    down = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D")
    up = ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    shape = dict(block_out_channels=(64, 128, 192), layers_per_block=1, attention_head_dim=64)
    return shape | dict(down_block_types=down, up_block_types=up, resnet_time_scale_shift="scale_shift")


def course() -> dict:
    """Those of unit 1 of the Hugging Face course on diffusion models."""
    down = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    up = ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    shape = dict(block_out_channels=(64, 128, 128, 256), layers_per_block=2)
    return shape | dict(down_block_types=down, up_block_types=up)


def diffusers_peer(args, shape: dict, switched: bool) -> Peer:
    import diffusers
    from diffusers.training_utils import EMAModel

    net, cast = switches(diffusers.UNet2DModel(sample_size=32, num_class_embeds=CLASSES + 1, **shape), args, switched)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
    ema = EMAModel(net.parameters(), 0.9999, use_ema_warmup=True, power=0.75)

    def eps(x_t, t, y):
        with cast():
            return net(x_t, t, class_labels=y).sample.float()

    def loss(x_0, y):
        noise = torch.randn_like(x_0)
        t = torch.randint(1000, (len(x_0),), device=x_0.device)
        y = torch.where(torch.rand(len(y), device=y.device) < 0.1, CLASSES, y)
        return F.mse_loss(eps(scheduler.add_noise(x_0, noise, t), t, y), noise)

    @torch.inference_mode()
    def sampler(batch, steps):
        solver = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config)
        solver.set_timesteps(steps, device=args.device)
        x = torch.randn(batch, 3, 32, 32, device=args.device)
        y = torch.arange(batch, device=args.device) % CLASSES
        for t in solver.timesteps:
            x = solver.step(eps(x, t, y), t, x).prev_sample
        return x

    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-4)
    average = functools.partial(ema.step, net.parameters())
    averaged = functools.partial(ema.copy_to, net.parameters())
    return Peer(net, eps, loss, scheduler.alphas_cumprod.double(), optimizer, average, averaged, sampler)


def lucidrains_peer(args, shape: dict, switched: bool) -> Peer:
    """denoising-diffusion-pytorch with the settings of its Trainer; it has no classes."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    unet = Unet(flash_attn=switched and args.device == "cuda", **shape)
    diffusion, cast = switches(GaussianDiffusion(unet, image_size=32, sampling_timesteps=20), args, switched)
    ema = EMA(diffusion, beta=0.995, update_every=10)
    alpha_bar = diffusion.alphas_cumprod.double().cpu().clamp(1e-9, 1 - 1e-9)
    log_snr = torch.logit(alpha_bar).to(args.device)

    def eps(x_t, t, y):
        low = t.long().clamp(max=998)
        a = torch.lerp(log_snr[low], log_snr[low + 1], (t - low).double()).sigmoid().float().view(-1, 1, 1, 1)
        with cast():
            v = diffusion.model(x_t, t).float()
        return a.sqrt() * v + (1 - a).sqrt() * x_t

    def loss(x_0, y):
        with cast():
            return diffusion((x_0 + 1) / 2)

    @torch.inference_mode()
    def sampler(batch, steps):
        with cast():
            return diffusion.sample(batch)

    optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))

    def averaged():
        return diffusion.load_state_dict(ema.ema_model.state_dict())

    return Peer(diffusion.model, eps, loss, alpha_bar, optimizer, ema.update, averaged, sampler)


def update(peer: Peer, batches) -> None:
    """One step of the peer's training on one batch, or on several whose gradients are added."""
    for x_0, y in batches:
        (peer.loss(x_0, y) / len(batches)).backward()
    nn.utils.clip_grad_norm_(peer.net.parameters(), 1.0)
    peer.optimizer.step()
    peer.optimizer.zero_grad()
    peer.average()


@dataclass
class Tasks:
    """What is timed."""

    net: nn.Module
    forward: callable
    train: callable
    evaluate: callable
    sample: callable


def notebook_tasks(nb, args) -> Tasks:
    work, run = trainer(nb, args.device, args.precision, args.batch)
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    y = torch.arange(args.batch, device=args.device) % CLASSES
    t = torch.full_like(y, 500)

    def forward():
        return run.model(x, t, y)

    return Tasks(
        run.model, forward, work, torch.inference_mode()(forward), lambda: nb.sample(run.model, y[: args.draws])
    )


def peer_tasks(nb, args, make) -> Tasks:
    peer = make(args)
    x = torch.rand(args.batch, 3, 32, 32, device=args.device) * 2 - 1
    y = torch.arange(args.batch, device=args.device) % CLASSES
    t = torch.full_like(y, 500)

    def forward():
        return peer.eps(x, t, y)

    evaluate = torch.inference_mode()(forward)
    return Tasks(peer.net, forward, lambda: update(peer, [(x, y)]), evaluate, lambda: peer.sampler(args.draws, 20))


LIKE_OURS = dict(dim=56, dim_mults=(1, 2, 2))  # of about the notebook's GFLOP
PEERS = {
    "notebook": notebook_tasks,
    "diffusers": functools.partial(peer_tasks, make=lambda args: diffusers_peer(args, same_shape(), False)),
    "diffusers, same switches": functools.partial(
        peer_tasks, make=lambda args: diffusers_peer(args, same_shape(), True)
    ),
    "denoising-diffusion-pytorch": functools.partial(
        peer_tasks, make=lambda args: lucidrains_peer(args, LIKE_OURS, False)
    ),
    "denoising-diffusion-pytorch, same switches": functools.partial(
        peer_tasks, make=lambda args: lucidrains_peer(args, LIKE_OURS, True)
    ),
}


# ------------------------------------------------------------------------------------------------- equal time
def ticks(minutes: float):
    """(step, share of the time that is over) until it is."""
    start = time.monotonic()
    step = 0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        yield step, share
        step += 1


def race_notebook(nb, args, images, prepare=None, guidance=2.0, **settings):
    """The notebook's recipe, its rate falling to 0 over the second half of the time."""
    settings = {"batch_size": args.batch, "warmup": 50, "ema_half_life": 30, **settings}
    run = nb.new_run(nb.make_config("gpu", device=args.device, precision=args.precision, **settings))
    if prepare:
        prepare(nb, run)
    alpha_bar = nb.make_schedule(run.config)
    alpha_bar = alpha_bar.cuda() if args.device == "cuda" else alpha_bar
    if args.device == "cuda":
        run.forward = nb.compiled(run.forward, *nb.batch_at(0, images, args.batch, 0))
    for step, share in ticks(args.minutes):
        length = max(step + 1, round(step / share)) if share > 0.02 else 10**6
        run.config = nb.replace(run.config, train_steps=length)
        nb.train_step(run, *nb.batch_at(step, images, args.batch, 0), alpha_bar)
    return run.model, alpha_bar.cpu(), {"images_seen": run.images_seen, "guidance": guidance}


def race_peer(nb, args, images, make, batch: int = 0, accumulate: int = 1, guidance=2.0):
    peer = make(args)
    size = batch or args.batch
    for step, _ in ticks(args.minutes):
        batches = [nb.batch_at(accumulate * step + k, images, size, 0) for k in range(accumulate)]
        update(peer, batches)
    peer.averaged()

    def eps(x_t, t, y):
        return peer.eps(x_t, t, y)

    eps.config = SimpleNamespace(num_classes=CLASSES)
    return eps, peer.alpha_bar.cpu(), {"images_seen": (step + 1) * size * accumulate, "guidance": guidance}


def group_norm(nb, run) -> None:
    """GroupNorm in place of the norm over a pixel's channels, in the network and its average."""
    for net in (run.network, run.model):
        for module in list(net.modules()):
            for name, norm in module.named_children():
                if isinstance(norm, nb.PixelNorm):
                    other = nn.GroupNorm(32, norm.normalized_shape[0], affine=norm.elementwise_affine)
                    setattr(module, name, other.to(run.accelerator.device))
    run.optimizers = nb.make_optimizers(run.network, run.config)


README = dict(dim=64, dim_mults=(1, 2, 4, 8))
ARMS = {
    "notebook": race_notebook,
    "diffusers, course": functools.partial(
        race_peer, make=lambda args: diffusers_peer(args, course(), False), batch=64
    ),
    "denoising-diffusion-pytorch, README": functools.partial(
        race_peer, make=lambda args: lucidrains_peer(args, README, False), batch=32, accumulate=2, guidance=1
    ),
    "diffusers, every switch": functools.partial(race_peer, make=lambda args: diffusers_peer(args, same_shape(), True)),
    "notebook, no guidance": functools.partial(race_notebook, guidance=1),
}
small = functools.partial(race_notebook, widths=(32, 64, 128))
PARTS = {
    "recipe": small,
    "adamw": functools.partial(small, optimizer="adamw", learning_rate=2e-3),
    "linear": functools.partial(small, schedule="linear"),
    "groupnorm": functools.partial(small, prepare=group_norm),
}


# -------------------------------------------------------------------------------------------------- measuring


def interleaved(arms: dict, rounds: int) -> dict:
    """Seconds of every call of every arm, taking turns, after one call each to warm up."""
    seconds = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, work in arms.items():
            start = time.perf_counter()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def against(seconds: dict, first: str) -> dict:
    """For every arm its median seconds, and how often faster `first` was in the same round: median and range."""
    found = {}
    for name, times in seconds.items():
        ratios = sorted(other / mine for mine, other in zip(seconds[first], times))
        found[name] = {"seconds": round(statistics.median(times), 4), "ratio": round(statistics.median(ratios), 3)}
        found[name]["range"] = [round(ratios[0], 3), round(ratios[-1], 3)]
    return found


def peak(device: str, precision: str, batch: int) -> float:
    """GFLOP/s of the fastest of several 3×3 convolutions of the network's own sizes."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    best = 0.0
    for c_in, c_out, side in ((64, 64, 32), (128, 64, 32), (128, 128, 16), (384, 192, 8)):
        x = torch.randn(batch, c_in, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        w = torch.randn(c_out, c_in, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        seconds = interleaved({"it": functools.partial(F.conv2d, x, w, padding=1)}, 5)["it"]
        best = max(best, 2 * x[:, 0].numel() * c_in * c_out * 9 / min(seconds) / 1e9)
    return best


def gigaflop(forward, batch: int) -> float:
    with FlopCounterMode(display=False) as count, torch.no_grad():
        forward()
    return count.get_total_flops() / batch / 1e9


def step(nb, args) -> dict:
    arms = {
        "second edition": trainer(nb, args.device, args.precision, args.batch)[0],
        "first edition": trainer(first_edition(), args.device, args.precision, args.batch)[0],
    }
    return {"arms": against(interleaved(arms, args.rounds), "second edition")}


def peers(nb, args) -> dict:
    found = {"peak_gflops": round(peak(args.device, args.precision, args.batch), 1), "tasks": {}}
    made = {name: make(nb, args) for name, make in PEERS.items()}
    found["networks"] = {
        name: {
            "million_parameters": round(sum(p.numel() for p in arm.net.parameters()) / 1e6, 2),
            "gflop": round(gigaflop(arm.forward, args.batch), 2),
        }
        for name, arm in made.items()
    }
    for task, images in (("train", args.batch), ("evaluate", args.batch), ("sample", args.draws)):
        times = against(interleaved({name: getattr(arm, task) for name, arm in made.items()}, args.rounds), "notebook")
        for name, row in times.items():
            row["images_per_second"] = round(images / row["seconds"], 2)
            passes = {"train": 3, "evaluate": 1, "sample": 20}[task]
            row["gflops"] = round(passes * found["networks"][name]["gflop"] * images / row["seconds"], 1)
            row["share_of_peak"] = round(row["gflops"] / found["peak_gflops"], 2)
            row["ratio_per_gflop"] = round(
                row["ratio"] * found["networks"]["notebook"]["gflop"] / found["networks"][name]["gflop"], 3
            )
        found["tasks"][task] = times
        print(task, json.dumps(times, indent=1), flush=True)
    return found


def slope(points: dict) -> float:
    """The exponent of y ~ x ** exponent, fitted to {x: y}."""
    return round(float(np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)[0]), 2)


def growth(nb, args) -> dict:
    model = nb.load_weights(ROOT / "assets" / "unet-cifar10.safetensors", args.device, args.precision)
    y = torch.arange(args.batch, device=args.device) % 10
    x_0 = torch.rand(64, 3, 32, 32, device=args.device) * 2 - 1
    train = functools.partial(trainer, nb, args.device, args.precision)
    widths = {w: (w, 2 * w, 3 * w) for w in (32, 48, 64, 96)}
    axes = {
        "batch": {n: train(n)[0] for n in (8, 16, 32, 64)},
        "first width": {w: train(16, widths=shape)[0] for w, shape in widths.items()},
        "image side": {n: train(16, image_shape=(3, n, n))[0] for n in (16, 24, 32, 48)},
        "sampling steps": {n: functools.partial(nb.sample, model, y[:8], n) for n in (5, 10, 20, 40)},
        "test images": {n: functools.partial(nb.classify, model, x_0[:n]) for n in (1, 2, 4, 8)},
    }
    found = {}
    for name, arms in axes.items():
        seconds = interleaved(arms, args.rounds)
        points = {n: round(statistics.median(times), 4) for n, times in seconds.items()}
        found[name] = {"seconds": points, "exponent": slope(points)}
        print(name, found[name], flush=True)
    nb.plt.rcParams["figure.constrained_layout.use"] = True
    fig, axes = nb.plt.subplots(1, len(found), figsize=(12, 2.6))
    for ax, (name, row) in zip(axes, found.items()):
        ax.loglog(list(row["seconds"]), list(row["seconds"].values()), "o-")
        ax.set(xlabel=name, title=f"grows as its power {row['exponent']}")
        ax.set_xticks(list(row["seconds"]), list(row["seconds"]))
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds")
    path = ROOT / "benchmarks" / "results" / "growth.png"
    nb.write_whole(path, lambda part: fig.savefig(part, format="png", dpi=90))
    return {"growth": found}


GROUPS = {
    "convolutions": ("conv",),
    "norms": ("layer_norm",),
    "other matrix products (attention, embeddings, Muon)": ("bmm", "softmax", "addmm", "aten::mm"),
    "activations": ("silu",),
    "optimisers, clipping and average": ("adam", "lerp", "foreach", "norm"),
    "copies and skip connections": ("copy", "cat", "upsample", "avg_pool", "clone", "fill"),
}


def profile(nb, args) -> dict:
    work, run = trainer(nb, args.device, args.precision, args.batch)
    work()
    with torch.profiler.profile() as profiler:
        for _ in range(args.rounds):
            work()
    shares = dict.fromkeys([*GROUPS, "the rest"], 0.0)
    events = profiler.key_averages()
    kind = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    total = sum(getattr(event, kind) for event in events)
    for event in events:
        group = next((g for g, words in GROUPS.items() if any(w in event.key for w in words)), "the rest")
        shares[group] += getattr(event, kind) / total
    return {"shares": {group: round(share, 3) for group, share in shares.items()}}


def rate(nb, args) -> None:
    """Images a second of `args.rounds` training steps on all launched processes, printed by the first."""
    config = nb.make_config("gpu", device=args.device, precision=args.precision, batch_size=args.batch)
    run = nb.new_run(config)
    x_0 = torch.rand(args.batch, 3, 32, 32) * 2 - 1
    y = torch.arange(args.batch) % 10
    alpha_bar = nb.make_schedule(config)
    nb.train_step(run, x_0, y, alpha_bar)
    start = time.perf_counter()
    for _ in range(args.rounds):
        nb.train_step(run, x_0, y, alpha_bar)
    if run.accelerator.is_main_process:
        print(f"rate {args.batch * args.rounds / (time.perf_counter() - start):.3f}")
    run.accelerator.end_training()


def scale(nb, args) -> dict:
    """Each process has one thread, so that two of them have twice the cores of one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    rates = {}
    for name, processes, batch in (
        ("1", 1, args.batch),
        ("2, same batch", 2, args.batch),
        ("2, twice", 2, 2 * args.batch),
    ):
        call = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {__file__} rate --threads 1".split()
        call += f"--batch {batch} --rounds {args.rounds} --precision {args.precision} --device cpu".split()
        done = subprocess.run([sys.executable, *call], env=environment, capture_output=True, text=True)
        rates[name] = float(done.stdout.split("rate ")[1].split()[0])
        print(name, rates[name], flush=True)
    gradient = 4 * sum(p.numel() for p in nb.UNet(nb.make_config("gpu", device="cpu")).parameters())
    return {"images_per_second": rates, "gradient_bytes": gradient}


def equal_time(nb, args, arms: dict, name: str) -> dict:
    """Train one arm for the same minutes, draw from it, and compare what every finished arm has drawn."""
    from measure import features, frechet, kernel_distance, save_array, with_interval

    folder = Path(args.keep) / name
    test = nb.load_images(nb.make_config("cpu", device=args.device, data_dir=args.data, download=False), False)
    if args.arm:
        images = nb.load_images(nb.make_config("cpu", data_dir=args.data, device=args.device, download=False), True)
        start = time.monotonic()
        eps, alpha_bar, facts = arms[args.arm](nb, args, images.to(args.device))
        facts |= {"minutes": round((time.monotonic() - start) / 60, 1), "machine": machine(args)}
        y = (torch.arange(args.draws) % 10).to(args.device)
        parts = []
        for k, part in enumerate(y.split(50)):
            x_T = torch.randn(len(part), 3, 32, 32, generator=torch.Generator().manual_seed(k)).to(args.device)
            with torch.inference_mode():
                t = nb.timesteps(alpha_bar, 20)
                x_0 = nb.solve(eps, x_T, part, t, alpha_bar, 0.0, 2, facts.get("guidance", 1), (0.3, 3))
            parts.append(nb.to_uint8(x_0).cpu().numpy())
            print(f"{(k + 1) * 50} drawn", flush=True)
        nb.write_whole(folder / f"{args.arm}.npy", functools.partial(save_array, np.concatenate(parts)))
        nb.write_whole(folder / f"{args.arm}.json", lambda part: part.write_text(json.dumps(facts)))
    reference = features(test.images, args.device)
    found, rows = {}, []
    for arm in (arm for arm in arms if (folder / f"{arm}.json").exists()):
        drawn = torch.from_numpy(np.load(folder / f"{arm}.npy"))
        ours = features(drawn, args.device)
        found[arm] = json.loads((folder / f"{arm}.json").read_text()) | {"images": len(drawn)}
        found[arm]["KID"] = with_interval(kernel_distance, ours, reference[::2][:4000])
        found[arm]["FD"] = with_interval(frechet, ours, reference)
        rows.append(drawn[:40].permute(2, 0, 3, 1).reshape(32, -1, 3))
    sheet = nb.Image.fromarray(torch.cat(rows).numpy()).resize((40 * 64, len(rows) * 64), nb.Image.Resampling.NEAREST)
    nb.write_whole(ROOT / "benchmarks" / "results" / f"{name}.png", lambda part: sheet.save(part, "PNG"))
    return {"arms": found}


def machine(args) -> dict:
    cpu = torch.cpu.get_capabilities()
    fast = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu.get("cpu_name", "CPU")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts = {
        "device": name,
        "threads": torch.get_num_threads(),
        "precision": args.precision,
        "torch": torch.__version__,
    }
    return facts | {"fast in bf16": fast, "commit": commit.stdout.strip(), "date": time.strftime("%Y-%m-%d")}


TASKS = {"step": step, "peers": peers, "growth": growth, "profile": profile, "scale": scale}
TASKS |= {"race": functools.partial(equal_time, arms=ARMS, name="race")}
TASKS |= {"recipe": functools.partial(equal_time, arms=PARTS, name="recipe")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*TASKS, "rate"))
    parser.add_argument("--name", default="", help="of the results file, for one more machine")
    parser.add_argument("--arm", default="")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draws", type=int, default=1000, help="images drawn by an arm of a race; peers: by a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default=None)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", default="data")
    parser.add_argument("--keep", default="runs/equal-time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    nb = loader.load()
    args.precision = args.precision or nb.precisions(args.device)[0]
    if args.what == "rate":
        return rate(nb, args)
    measured = TASKS[args.what](nb, args) | {"batch": args.batch, "rounds": args.rounds, "machine": machine(args)}
    path = ROOT / "benchmarks" / "results" / f"{args.what}{args.name and '-'}{args.name}.json"
    path.write_text(json.dumps(measured, indent=1) + "\n")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
