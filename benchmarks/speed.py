"""Speed, as ratios within one run: what is compared takes turns, and medians over the rounds are quoted.

python benchmarks/speed.py peers                 # training, sampling, evaluating: against diffusers and denoising-diffusion-pytorch
python benchmarks/speed.py growth                # cost against batch, width, image side, steps and images
python benchmarks/speed.py profile               # where the time of a training step goes
python benchmarks/speed.py scale                 # one and two processes
python benchmarks/speed.py race --arm notebook   # equal time, one arm a call (ARMS), nothing else running; then without --arm
python benchmarks/speed.py recipe --arm adamw    # the recipe's parts in the same way (PARTS)
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from release import RESULTS, ROOT, images_of, keep, loader, options
from torch.utils.flop_counter import FlopCounterMode

CLASSES = 10


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
# A peer: its network, its answer eps(x_t, t, y), the loss(x_0, y) it trains on, its schedule and optimizer, average()
# for a step of its moving average, averaged() that puts it in place of the weights, its own sampler(batch, steps).
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


def diffusers_peer(args, shape: dict, switched: bool) -> SimpleNamespace:
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

    made = dict(net=net, eps=eps, loss=loss, alpha_bar=scheduler.alphas_cumprod.double(), sampler=sampler)
    made |= dict(optimizer=torch.optim.AdamW(net.parameters(), lr=4e-4))
    made |= dict(average=functools.partial(ema.step, net.parameters()))
    return SimpleNamespace(averaged=functools.partial(ema.copy_to, net.parameters()), **made)


def lucidrains_peer(args, shape: dict, switched: bool) -> SimpleNamespace:
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

    made = dict(net=diffusion.model, eps=eps, loss=loss, alpha_bar=alpha_bar, sampler=sampler, average=ema.update)
    made |= dict(optimizer=torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99)))
    return SimpleNamespace(averaged=lambda: diffusion.load_state_dict(ema.ema_model.state_dict()), **made)


def update(peer, batches) -> None:
    """One step of the peer's training on one batch, or on several whose gradients are added."""
    for x_0, y in batches:
        (peer.loss(x_0, y) / len(batches)).backward()
    nn.utils.clip_grad_norm_(peer.net.parameters(), 1.0)
    peer.optimizer.step()
    peer.optimizer.zero_grad()
    peer.average()


def tasks(nb, args, peer=None) -> SimpleNamespace:
    """What is timed of the notebook or of a peer: a training step, an evaluation, and drawing with 20 steps."""
    x = torch.rand(args.batch, 3, 32, 32, device=args.device) * 2 - 1
    y = torch.arange(args.batch, device=args.device) % CLASSES
    t = torch.full_like(y, 500)
    if peer:
        make, *how = peer
        made = make(args, *how)
        net, eps = made.net, made.eps
        train = functools.partial(update, made, [(x, y)])
        sample = functools.partial(made.sampler, args.draws, 20)
    else:
        train, run = trainer(nb, args.device, args.precision, args.batch)
        net = eps = run.model
        sample = functools.partial(nb.sample, net, y[: args.draws])

    @torch.inference_mode()
    def evaluate():
        return eps(x, t, y)

    return SimpleNamespace(net=net, train=train, evaluate=evaluate, sample=sample)


LIKE_OURS = dict(dim=56, dim_mults=(1, 2, 2))  # of about the notebook's GFLOP
PEERS = {
    "notebook": None,
    "diffusers": (diffusers_peer, same_shape(), False),
    "diffusers, same switches": (diffusers_peer, same_shape(), True),
    "denoising-diffusion-pytorch": (lucidrains_peer, LIKE_OURS, False),
    "denoising-diffusion-pytorch, same switches": (lucidrains_peer, LIKE_OURS, True),
}


# ------------------------------------------------------------------------------------------------- equal time
def ticks(minutes: float):
    """(step, share of the time that is over) until it is."""
    start = time.monotonic()
    step = 0
    while minutes and (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        yield step, share
        step += 1


def train_notebook(nb, args, images, prepare=None, **settings):
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
    return run.model, run.model, alpha_bar.cpu(), run.images_seen


def train_peer(nb, args, images, peer, batch: int = 0, accumulate: int = 1):
    make, *how = peer
    made = make(args, *how)
    size = batch or args.batch
    step = -1
    for step, _ in ticks(args.minutes):
        batches = [nb.batch_at(accumulate * step + k, images, size, 0) for k in range(accumulate)]
        update(made, batches)
    made.averaged()

    def eps(x_t, t, y):
        return made.eps(x_t, t, y)

    eps.config = SimpleNamespace(num_classes=CLASSES)
    return made.net, eps, made.alpha_bar.cpu(), (step + 1) * size * accumulate


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
README_BATCH = dict(batch=32, accumulate=2)
ARMS = {
    "notebook": dict(guidance=(1, 2)),
    "diffusers, course": dict(peer=(diffusers_peer, course(), False), batch=64),
    "denoising-diffusion-pytorch, README": dict(peer=(lucidrains_peer, README, False), guidance=(1,), **README_BATCH),
    "diffusers, every switch": dict(peer=(diffusers_peer, same_shape(), True)),
}
SMALL = dict(widths=(32, 64, 128))
PARTS = {
    "recipe": SMALL,
    "adamw": SMALL | dict(optimizer="adamw", learning_rate=2e-3),
    "linear": SMALL | dict(schedule="linear"),
    "groupnorm": SMALL | dict(prepare=group_norm),
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


def peers(nb, args) -> dict:
    args.draws = min(args.draws, 16)
    found = {"peak_gflops": round(peak(args.device, args.precision, args.batch), 1), "tasks": {}}
    made = {name: tasks(nb, args, peer) for name, peer in PEERS.items()}
    found["networks"] = {}
    for name, arm in made.items():
        size = round(sum(p.numel() for p in arm.net.parameters()) / 1e6, 2)
        with FlopCounterMode(display=False) as count:
            arm.evaluate()
        gflop = round(count.get_total_flops() / args.batch / 1e9, 2)
        found["networks"][name] = {"million_parameters": size, "gflop": gflop}
    for task, images in (("train", args.batch), ("evaluate", args.batch), ("sample", args.draws)):
        times = against(interleaved({name: getattr(arm, task) for name, arm in made.items()}, args.rounds), "notebook")
        for name, row in times.items():
            row["images_per_second"] = round(images / row["seconds"], 2)
            passes = {"train": 3, "evaluate": 1, "sample": 20}[task]
            row["gflops"] = round(passes * found["networks"][name]["gflop"] * images / row["seconds"], 1)
            row["share_of_peak"] = round(row["gflops"] / found["peak_gflops"], 2)
            share = found["networks"]["notebook"]["gflop"] / found["networks"][name]["gflop"]
            row["ratio_per_gflop"] = round(row["ratio"] * share, 3)
        found["tasks"][task] = times
        print(task, json.dumps(times, indent=1), flush=True)
    return found


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
        fitted = np.polyfit(np.log(list(points)), np.log(list(points.values())), 1)
        found[name] = {"seconds": points, "exponent": round(float(fitted[0]), 2)}
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
    fig.savefig(RESULTS / "growth.png", dpi=90)
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
    work, run = trainer(nb, args.device, args.precision, args.batch)
    work()
    start = time.perf_counter()
    for _ in range(args.rounds):
        work()
    if run.accelerator.is_main_process:
        print(f"rate {args.batch * args.rounds / (time.perf_counter() - start):.3f}")
    run.accelerator.end_training()


def scale(nb, args) -> dict:
    """Each process has one thread, so that two of them have twice the cores of one."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    rates = {}
    for name, processes, times in (("1", 1, 1), ("2, same batch", 2, 1), ("2, twice", 2, 2)):
        call = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {__file__} rate --threads 1".split()
        call += f"--batch {times * args.batch} --rounds {args.rounds} --precision {args.precision} --device cpu".split()
        done = subprocess.run([sys.executable, *call], env=environment, capture_output=True, text=True)
        rates[name] = float(done.stdout.split("rate ")[1].split()[0])
        print(name, rates[name], flush=True)
    gradient = 4 * sum(p.numel() for p in nb.UNet(nb.make_config("gpu", device="cpu")).parameters())
    return {"images_per_second": rates, "gradient_bytes": gradient}


def draw(nb, args, eps, alpha_bar, guidance: float, path: Path) -> None:
    """Draw uint8 images into `path`, 20 steps of the notebook's DPM-Solver++, from the same noise for every arm."""
    from measure import save_array

    drawn = np.load(path) if path.exists() else np.zeros((0, 3, 32, 32), np.uint8)
    t = nb.timesteps(alpha_bar, 20)
    while len(drawn) < args.draws:
        x_T = torch.randn(50, 3, 32, 32, generator=torch.Generator().manual_seed(len(drawn))).to(args.device)
        y = (torch.arange(50) % CLASSES).to(args.device)
        with torch.inference_mode():
            x_0 = nb.solve(eps, x_T, y, t, alpha_bar, 0.0, 2, guidance, (0.3, 3))
        drawn = np.concatenate([drawn, nb.to_uint8(x_0).cpu().numpy()])
        nb.write_whole(path, functools.partial(save_array, drawn))
        print(f"{path.stem}: {len(drawn)} drawn", flush=True)


def equal_time(nb, args, arms: dict, name: str) -> dict:
    """With an arm: train it for the same minutes, or go on from its end, and draw. Without: compare what all have drawn."""
    folder = Path(args.keep) / name
    folder.mkdir(parents=True, exist_ok=True)
    if args.arm:
        settings = {"guidance": (2,), **arms[args.arm]}
        guidances = settings.pop("guidance")
        train = train_peer if "peer" in settings else train_notebook
        trained = folder / f"{args.arm}.pt"
        facts = {"minutes": args.minutes, "machine": machine(args)}
        args.minutes *= not trained.exists()
        net, eps, alpha_bar, seen = train(nb, args, images_of(nb, args, True).to(args.device), **settings)
        if trained.exists():
            saved = torch.load(trained, weights_only=True)
            net.load_state_dict(saved["net"])
            facts = saved["facts"]
        else:
            facts["images_seen"] = seen
            nb.write_whole(trained, functools.partial(torch.save, {"net": net.state_dict(), "facts": facts}))
        if args.arm == "notebook":  # to be measured as one of the points of assets/progress.png
            nb.save_weights(folder / "notebook.safetensors", eps, facts)
        for guidance in guidances:
            path = folder / f"{args.arm}, guidance {guidance}.npy"
            path.with_suffix(".json").write_text(json.dumps(facts))
            draw(nb, args, eps, alpha_bar, guidance, path)
        return {}
    return compare(nb, args, folder, list(arms), name)


def compare(nb, args, folder: Path, arms: list, name: str) -> dict:
    """KID and FD to the test images of an equal number of images of every arm, and a picture of forty of each."""
    from measure import features, frechet, kernel_distance, with_interval

    files = sorted(folder.glob("*.npy"), key=lambda file: (arms.index(file.stem.rpartition(",")[0]), file.stem))
    drawn = [torch.from_numpy(np.load(file)) for file in files]
    least = min(map(len, drawn))
    reference = features(images_of(nb, args, False).images, args.device)
    found = {}
    for file, images in zip(files, drawn):
        ours = features(images[:least], args.device)
        found[file.stem] = json.loads(file.with_suffix(".json").read_text()) | {"images": least}
        found[file.stem]["KID"] = with_interval(kernel_distance, ours, reference[::2][:4000])
        found[file.stem]["FD"] = with_interval(frechet, ours, reference)
    rows = [images[:40].permute(2, 0, 3, 1).reshape(32, -1, 3) for images in drawn]
    sheet = nb.Image.fromarray(torch.cat(rows).numpy())
    sheet.resize((2 * sheet.width, 2 * sheet.height), nb.Image.Resampling.NEAREST).save(RESULTS / f"{name}.png")
    return {"arms": found}


def machine(args) -> dict:
    cpu = torch.cpu.get_capabilities()
    fast = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu.get("cpu_name", "CPU")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    facts = {"device": name, "threads": torch.get_num_threads(), "precision": args.precision, "fast in bf16": fast}
    return facts | {"torch": str(torch.__version__), "commit": commit.stdout.strip(), "date": time.strftime("%Y-%m-%d")}


TASKS = {"peers": peers, "growth": growth, "profile": profile, "scale": scale}
TASKS |= {"race": functools.partial(equal_time, arms=ARMS, name="race")}
TASKS |= {"recipe": functools.partial(equal_time, arms=PARTS, name="recipe")}


def main() -> None:
    plan = dict(name="", arm="", minutes=20.0, batch=64, draws=1000, rounds=5, precision=None, keep="runs/equal-time")
    args = options(__doc__, "what", (*TASKS, "rate"), **plan)
    nb = loader.load()
    args.precision = args.precision or nb.precisions(args.device)[0]
    if args.what == "rate":
        return rate(nb, args)
    if measured := TASKS[args.what](nb, args):
        measured |= {"batch": args.batch, "rounds": args.rounds, "machine": machine(args)}
        keep(f"{args.what}{args.name and '-'}{args.name}", measured)


if __name__ == "__main__":
    main()
