"""What one worker process of peers.py does: one system each, built and run the way its users do."""

import contextlib
import gc
import os
import platform
import re
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WIDTHS, DROPOUT = (128, 256, 256, 256), 0.1  # the CIFAR-10 network of Ho et al. (2020), in every system
NOTEBOOK, SHIPPED = "notebook", "notebook, shipped weights"
GROUPS = {  # a profiled operation belongs to the first group that it, or an operation around it, matches
    "optimiser and average": r"Optimizer\.step|_foreach_|_fused_|^EMA$",
    "attention": r"attention|softmax|bmm",
    "normalisation": r"group_?norm|layer_?norm|batch_?norm|rms_?norm",
    "activation": r"silu|gelu|relu|sigmoid|dropout|bernoulli",
    "convolution": r"conv",
    "copies": r"copy|clone|contiguous|aten::cat$|CatBackward|aten::to$|zero_|fill_|slice_backward",
}


def peak_memory(device: str, reset: bool = False) -> float:
    """The most memory (MB) that this process has held on `device` since the last reset."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":
        if reset:
            with contextlib.suppress(OSError):  # refused in some containers; then the peak is that since the start
                Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


class System:
    """One worker. Its public methods are the parent's commands; each kind of work is a method that returns
    (work to be timed, work to warm up with, facts about it)."""

    usual = None  # (solver, steps) that its users get when they choose nothing

    def __init__(self, device: str, precision: str, switched: bool):
        torch.set_num_threads(CORES)
        torch.manual_seed(0)
        self.device, self.precision, self.switched = device, precision, switched
        self.setup()
        self.idle = peak_memory(device, reset=True)

    def setup(self):
        """Import the library that this worker is for."""

    def prepare(self, kind: str, warm_ups: int = 2, **options) -> dict:
        """Build a kind of work, warm it up, and return the facts about it."""
        self.work = None
        gc.collect()
        peak_memory(self.device, reset=True)
        self.work, warm, facts = getattr(self, kind)(**options)
        for _ in range(warm_ups):
            warm()
        self.sync()
        return facts

    def time(self, times: int = 1) -> float:
        """Seconds that the prepared work takes."""
        start = time.perf_counter()
        for _ in range(times):
            self.work()
        self.sync()
        return (time.perf_counter() - start) / times

    def memory(self) -> dict:
        return {"peak_mb": peak_memory(self.device), "idle_mb": self.idle}

    def profile(self, times: int) -> dict:
        """Milliseconds of the prepared work by group of operations, and its ten most expensive operations."""
        on_gpu = self.device == "cuda"
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as seen:
            self.time(times)
        groups, ops = Counter(), Counter()
        for event in seen.events():
            if event.device_type != torch.autograd.DeviceType.CPU:
                continue  # a kernel: its time is also that of the operation which launched it
            spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000 / times
            names, around = [], event
            while around is not None:
                names.append(around.name)
                around = around.cpu_parent
            matches = (g for g, pattern in GROUPS.items() if any(re.search(pattern, n, re.I) for n in names))
            groups[next(matches, "other")] += spent
            ops[event.name] += spent
        return {"ms": sum(ops.values()), "groups": dict(groups.most_common()), "operations": dict(ops.most_common(10))}

    def sync(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def images(self, n: int, side: int = 32):
        """n images in [-1, 1] and their labels; noise will do, for speed does not depend on the picture."""
        return torch.rand(n, 3, side, side, device=self.device) * 2 - 1, torch.arange(n, device=self.device) % 10

    def like_ours(self, net):
        """The net on the device, as its library has it or, `switched`, laid out as the notebook's is."""
        net = net.to(self.device)
        return net.to(memory_format=torch.channels_last) if self.switched else net

    def cast(self):
        """Where the notebook computes in bf16, a `switched` system does too."""
        bf16 = self.switched and self.precision == "bf16"
        return torch.autocast(self.device, torch.bfloat16, enabled=bf16)

    def facts(self, net, call) -> dict:
        """Size of the net and floating-point operations of `call`, one forward pass on one image."""
        with FlopCounterMode(display=False) as count, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            call()
        parameters = sum(p.numel() for p in net.parameters())
        return {"million_parameters": parameters / 1e6, "forward_gflop": count.get_total_flops() / 1e9}


class Peak(System):
    """The device itself: how fast can it convolve at the network's own widths?"""

    def convolutions(self, precision: str, batch: int) -> float:
        """GFLOP/s of the fastest of several 3×3 convolutions, channels_last."""
        dtype, best = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], 0.0
        for c_in, c_out, side in ((128, 128, 32), (256, 128, 32), (256, 256, 16), (512, 256, 16), (256, 256, 8)):
            x = torch.randn(batch, c_in, side, side, device=self.device, dtype=dtype)
            w = torch.randn(c_out, c_in, 3, 3, device=self.device, dtype=dtype)
            x, w = (v.contiguous(memory_format=torch.channels_last) for v in (x, w))
            self.work = lambda x=x, w=w: F.conv2d(x, w, padding=1)
            self.time()
            seconds = min(self.time(20 if self.device == "cuda" else 1) for _ in range(4))
            best = max(best, 2 * x[:, 0].numel() * c_in * c_out * 9 / seconds / 1e9)
        return best


class Notebook(System):
    """The notebook's own functions, through the tests' loader."""

    usual = ("dpm++", 20)

    def setup(self):
        sys.path.insert(0, str(ROOT / "tests"))
        import loader

        self.nb = loader.load()

    def machine(self) -> dict:
        """The device, and the precision that the notebook picks on it."""
        info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
        cpu = re.search(r"model name\s*:\s*(.+)", info)
        name = cpu[1] if cpu else platform.processor()
        name = torch.cuda.get_device_name() if self.device == "cuda" else name
        return {"name": name, "precision": self.nb.pick_precision(self.device)}

    def config(self, preset: str, width: int = 1, side: int = 32, **more):
        nb = self.nb
        widths = tuple(width * w for w in nb.PRESETS[preset].get("widths", nb.Config.widths))
        fixed = dict(device=self.device, precision=self.precision, train_steps=10**6, image_shape=(3, side, side))
        return nb.make_config(preset, widths=widths, attention=nb.PRESETS[preset].get("attention"), **fixed, **more)

    def shape(self, preset: str) -> dict:
        """What Diffusers.unet needs to build the same network, with class labels."""
        c = self.config(preset)
        how = {"resnet_time_scale_shift": "scale_shift" if c.scale_shift else "default", "num_class_embeds": 11}
        return how | {n: getattr(c, n) for n in ("widths", "blocks", "attention", "head_dim", "embed_dim")}

    def training(self, preset: str = "ddpm", batch: int = 8, width: int = 1, side: int = 32, eager: bool = False):
        nb, config = self.nb, self.config(preset, width, side, batch_size=batch)
        run, alpha_bar = nb.new_run(config), nb.make_schedule(config).to(self.device)
        x, y = self.images(batch, side)
        self.leave_zero(run.network)
        facts = self.facts(run.network, lambda: run.network(x[:1], y[:1], y[:1]))
        if config.compile and not eager:
            nb.compile_in_place(run.network, x, y)

        def step():
            with record_function("train_step"):
                nb.train_step(run, x, y, alpha_bar)

        return step, step, facts

    def leave_zero(self, network):
        """As after some training: layers that start at zero would give gradients too small for a CPU to be quick with."""
        for p in network.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.02)

    def evaluating(self, preset: str, batch: int, width: int = 1, side: int = 32):
        """One forward pass, which is what sampling and classifying consist of."""
        model, (x, y) = self.nb.new_run(self.config(preset, width, side)).model, self.images(batch, side)
        return (work := torch.inference_mode()(lambda: model(x, y, y))), work, {}

    def model(self, preset: str, **more):
        """A network to be used: with the shipped weights, or as it is before training (the same work)."""
        if preset == "shipped":
            return self.nb.load_weights(ROOT / "assets/unet-cifar10.safetensors", self.device, self.precision)
        return self.nb.new_run(self.config(preset, **more)).model

    def sampling(self, solver: str, steps: int, images: int, preset: str = "ddpm"):
        model, (_, y) = self.model(preset), self.images(images)
        draw = lambda n: self.nb.sample(model, y, n, solver)  # noqa: E731
        return lambda: draw(steps), lambda: draw(1), {}

    def classifying(self, images: int, preset: str, **more):
        model, (x, y) = self.model(preset, **more), self.images(images)
        facts = self.facts(model, lambda: model(x[:1], y[:1], y[:1]))
        facts["evaluations"] = images * self.nb.classify(model, x).evaluations
        return (work := lambda: self.nb.classify(model, x)), work, facts


class Diffusers(System):
    """diffusers, as its examples/unconditional_image_generation trains and its DDPMPipeline draws."""

    usual = ("ddpm", 1000)

    def setup(self):
        import diffusers
        from diffusers.training_utils import EMAModel

        self.lib, self.ema = diffusers, EMAModel

    def unet(self, widths=WIDTHS, blocks=2, attention=(1,), head_dim=256, embed_dim=512, **more):
        """UNet2DModel of the shape of a notebook configuration."""
        down = [f"{'Attn' * (level in attention)}DownBlock2D" for level in range(len(widths))]
        up = [name.replace("Down", "Up") for name in reversed(down)]
        shape = dict(block_out_channels=tuple(widths), layers_per_block=blocks, attention_head_dim=head_dim)
        types = dict(down_block_types=tuple(down), up_block_types=tuple(up), time_embedding_dim=embed_dim)
        return self.like_ours(self.lib.UNet2DModel(sample_size=32, dropout=DROPOUT, **shape, **types, **more))

    def training(self, batch: int, eager: bool = False):
        unet, (x, y) = self.unet(), self.images(batch)
        facts = self.facts(unet, lambda: unet(x[:1], y[:1]))
        ema = self.ema(unet.parameters(), 0.9999, use_ema_warmup=True, power=0.75, foreach=self.switched)
        optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
        scheduler = self.lib.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        if self.switched and self.device == "cuda" and not eager:
            unet.compile()

        def step():
            noise, t = torch.randn_like(x), torch.randint(1000, (batch,), device=self.device)
            with self.cast():
                eps_hat = unet(scheduler.add_noise(x, noise, t), t).sample
            F.mse_loss(eps_hat.float(), noise).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with record_function("EMA"):
                ema.step(unet.parameters())

        return step, step, facts

    def sampling(self, solver: str, steps: int, images: int):
        scheduler = self.lib.DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        if solver == "dpm++":
            scheduler = self.lib.DPMSolverMultistepScheduler.from_config(scheduler.config)  # dpmsolver++, order 2
        pipeline = self.lib.DDPMPipeline(self.unet().eval(), scheduler)
        pipeline.set_progress_bar_config(disable=True)

        def draw(n):
            with self.cast():
                pipeline(batch_size=images, num_inference_steps=n, output_type="pt")

        return lambda: draw(steps), lambda: draw(1), {}

    def classifying(self, images: int, shape: dict):
        """A plain loop over the classes, one noise: ten evaluations an image."""
        unet, (x, y) = self.unet(**shape).eval(), self.images(images)
        facts = self.facts(unet, lambda: unet(x[:1], y[:1], y[:1]))
        scheduler, t = self.lib.DDPMScheduler(num_train_timesteps=1000), torch.full_like(y, 300)

        @torch.inference_mode()
        def classify():
            noise = torch.randn_like(x)
            x_t = scheduler.add_noise(x, noise, t)
            with self.cast():
                hats = [unet(x_t, t, torch.full_like(y, k)).sample for k in range(10)]
            return torch.stack([(hat - noise).square().mean((1, 2, 3)) for hat in hats]).argmin(0)

        return classify, classify, facts | {"evaluations": 10 * images}


class DenoisingDiffusion(System):
    """denoising-diffusion-pytorch, as its README and its Trainer use it."""

    usual = ("ddim", 250)

    def setup(self):
        import denoising_diffusion_pytorch
        from ema_pytorch import EMA

        self.lib, self.ema = denoising_diffusion_pytorch, EMA

    def diffusion(self, steps: int = 250):
        unet = self.lib.Unet(dim=128, dim_mults=(1, 2, 2, 2), dropout=DROPOUT, flash_attn=self.switched)
        return self.like_ours(self.lib.GaussianDiffusion(unet, image_size=32, sampling_timesteps=steps))

    def training(self, batch: int):
        diffusion, (x, y) = self.diffusion(), self.images(batch)
        facts = self.facts(diffusion.model, lambda: diffusion.model(x[:1], y[:1]))
        optimizer = torch.optim.Adam(diffusion.parameters(), lr=8e-5, betas=(0.9, 0.99))
        ema, x = self.ema(diffusion, beta=0.995, update_every=10), (x + 1) / 2
        if self.switched and self.device == "cuda":
            diffusion.model.compile()

        def step():
            with self.cast():
                loss = diffusion(x)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with record_function("EMA"):
                ema.update()

        return step, step, facts

    def sampling(self, solver: str, steps: int, images: int):
        diffusion = self.diffusion(steps).eval()  # its own sampler always takes `steps`, also to warm up
        if solver == "dpm++":  # the library has none: the notebook's solver asks the library's network
            notebook = Notebook(self.device, self.precision, True)
            model = lambda x, t, y: diffusion.model(x, t)  # noqa: E731
            model.config = notebook.config("ddpm")
            draw = lambda n: notebook.nb.sample(model, notebook.images(images)[1], n)  # noqa: E731
        else:
            draw = lambda n: diffusion.ddim_sample((images, 3, 32, 32))  # noqa: E731

        def work(n=steps):
            with self.cast():
                draw(n)

        return work, lambda: work(1), {}


SYSTEMS = {
    NOTEBOOK: (Notebook, True),
    "diffusers": (Diffusers, False),
    "diffusers + switches": (Diffusers, True),
    "denoising-diffusion-pytorch": (DenoisingDiffusion, False),
    "denoising-diffusion-pytorch + switches": (DenoisingDiffusion, True),
    SHIPPED: (Notebook, True),
    "device": (Peak, True),
}
COMPARED = list(SYSTEMS)[:5]


def serve(pipe, name: str, device: str, precision: str):
    """The life of a worker process: do what the parent asks, one command at a time, until it sends None."""
    kind, switched = SYSTEMS[name]
    system = kind(device, precision, switched)
    for command, options in iter(pipe.recv, None):
        try:
            pipe.send(getattr(system, command)(**options))
        except torch.OutOfMemoryError:
            pipe.send(MemoryError())
