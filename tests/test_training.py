"""Settings, the network, training, checkpoints and weights."""

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F


def images_of(nb, n=40, shape=(3, 32, 32), classes=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, *shape), generator=g, dtype=torch.uint8)
    return nb.ImageSet(pixels, torch.arange(n) % classes, tuple(str(k) for k in range(classes)), "random")


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_step": 5}, "did you mean 'train_steps'"),
        ({"train_steps": 0}, "train_steps = 0 must be at least 1"),
        ({"train_steps": "many"}, "train_steps = 'many' must be of type int"),
        ({"batch_size": 2.5}, "batch_size = 2.5 must be of type int"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"schedule": "sigmoid"}, "'linear' or 'cosine'"),
        ({"precision": "fp8"}, "precision"),
        ({"optimizer": "sgd"}, "'muon' or 'adamw'"),
        ({"device": "tpu"}, "device = 'tpu' cannot be used here"),
        ({"widths": ()}, "widths"),
        ({"attention": (7,)}, "attention"),
        ({"attention": (1.0,)}, "attention"),
        ({"widths": 64}, "widths = 64 must be of type tuple"),
        ({"T": 5}, "T = 5 must be at least 10"),
        ({"T": 100}, "T = 100 must be at least 500 with schedule = 'linear'"),
        ({"image_shape": (3, 33, 32)}, r"image_shape = \(3, 33, 32\) must be divisible by 2"),
        ({"sampling_steps": 2000}, "sampling_steps"),
        ({"label_drop": 1.5}, "label_drop"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**50}, "seed"),
        ({"head_dim": 0}, "head_dim"),
        ({"data_dir": ""}, "data_dir"),
    ],
)
def test_a_mistake_is_named_before_any_work(nb, wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        nb.make_config("smoke", **wrong)
    assert "\n" not in str(caught.value)


def test_fewer_widths_need_no_other_setting(nb):
    assert nb.make_config("cpu", widths=(32, 64), precision="fp32").attention == ()
    assert nb.make_config("gpu", widths=(64, 128), precision="fp32").attention == ()
    assert nb.make_config("ddpm", widths=(64, 128), precision="fp32").attention == (1,)  # a level that is still there
    assert nb.make_config("ddpm", widths=(64,), precision="fp32").attention == ()
    assert nb.make_config("smoke", widths=(16,)).attention == ()


def test_presets(nb):
    with pytest.raises(ValueError, match="preset = 'fast' must be 'auto' or one of cpu, gpu, ddpm, smoke"):
        nb.make_config("fast")
    auto = nb.make_config("auto", precision="fp32")
    assert auto.preset == ("cpu" if auto.device == "cpu" else "gpu")
    assert nb.make_config("auto", device="cpu:0", precision="fp32").preset == "cpu"
    assert nb.make_config("smoke", device=torch.device("cpu")).device == "cpu"
    assert nb.make_config("smoke", train_steps=None).train_steps == nb.PRESETS["smoke"]["train_steps"]
    assert nb.make_config("smoke", widths=[16, 32], grad_clip=2).widths == (16, 32)
    with pytest.raises(AttributeError):  # frozen
        auto.seed = 3


# ----------------------------------------------------------------------------------------------- network


def awake(nb, config, seed=0):
    """A UNet whose zeroed layers are random, so that every path can be seen in the output."""
    torch.manual_seed(seed)
    model = nb.UNet(config).eval()
    for p in model.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.2)
    return model


def test_ddpm_preset_is_the_published_network(nb):
    """35,746,307 parameters in the released google/ddpm-cifar10-32; ours has a label table besides."""
    config = nb.make_config("ddpm", precision="fp32")
    with torch.device("meta"):
        model = nb.UNet(config)
    count = sum(p.numel() for p in model.parameters())
    assert count - model.label.weight.numel() == 35_746_307
    assert config.schedule == "linear" and config.T == 1000 and config.dropout == 0.1 and config.batch_size == 128


def test_time_label_and_null_label_change_the_output(nb, tiny):
    model, x = awake(nb, tiny), torch.randn(1, 3, 32, 32)
    out = lambda t, y: model(x, torch.tensor([t]), torch.tensor([y]))  # noqa: E731
    base = out(500, 3)
    for other in (out(501, 3), out(500, 4), out(500, tiny.num_classes)):
        assert (base - other).abs().max() > 1e-3
    with pytest.raises(IndexError):
        out(500, tiny.num_classes + 1)


def test_an_untrained_network_has_no_opinion(nb, tiny):
    x, t, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 999]), torch.tensor([0, 10])
    assert nb.UNet(nb.replace(tiny, output="eps"))(x, t, y).abs().max() == 0
    noise = (1 - nb.make_schedule(tiny)[t]).sqrt().float().view(-1, 1, 1, 1)
    torch.testing.assert_close(nb.UNet(tiny)(x, t, y), noise * x)  # v_hat = 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_true_v_gives_the_true_noise(nb, tiny, schedule):
    config = nb.replace(tiny, schedule=schedule)
    alpha_bar, t = nb.make_schedule(config), torch.tensor([0, 1, 500, 998, 999])
    x_0, eps = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    a = alpha_bar[t].float().view(-1, 1, 1, 1)
    x_t, v = nb.q_sample(x_0, t, eps, alpha_bar), a.sqrt() * eps - (1 - a).sqrt() * x_0
    log_snr = torch.logit(alpha_bar).float()
    torch.testing.assert_close(nb.eps_from_v(x_t, v, log_snr[t]), eps, rtol=0, atol=2e-4)
    between = nb.at_step(t + 0.5, log_snr)  # fractional steps lie between their neighbours, and none beyond the last
    torch.testing.assert_close(between, (log_snr[t] + log_snr[(t + 1).clamp(max=999)]) / 2)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (4, 24, 40), (3, 6, 2)])
@pytest.mark.parametrize("levels", [(16, 24), (16,)])
def test_any_divisible_size_and_channel_count(nb, shape, levels):
    config = nb.make_config("smoke", image_shape=shape, widths=levels, attention=(0,), conv_resample=True)
    x = torch.randn(2, *shape)
    assert awake(nb, config)(x, torch.tensor([3, 4]), torch.tensor([0, 1])).shape == x.shape


def test_an_odd_size_needs_a_single_level(nb):
    config = nb.make_config("smoke", image_shape=(3, 7, 5), widths=(16,), attention=(0,))
    assert awake(nb, config)(torch.randn(2, 3, 7, 5), torch.tensor([3, 4]), torch.tensor([0, 1])).shape == (2, 3, 7, 5)


def test_images_in_a_batch_do_not_mix(nb, tiny):
    model, x = awake(nb, tiny), torch.randn(3, 3, 32, 32)
    t, y = torch.tensor([1, 500, 900]), torch.tensor([0, 5, 10])
    together = model(x, t, y)
    for i in range(3):
        torch.testing.assert_close(
            model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], together[i], atol=2e-5, rtol=1e-4
        )


def test_bf16_is_close_to_fp32(nb, tiny):
    model = awake(nb, tiny)
    low = nb.UNet(nb.replace(tiny, precision="bf16")).eval()
    low.load_state_dict(model.state_dict())
    args = torch.randn(4, 3, 32, 32), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 10])
    a, b = model(*args), low(*args)
    assert b.dtype == torch.float32 and ((a - b).norm() / a.norm()) < 0.03
    assert not torch.equal(a, b)


# ---------------------------------------------------------------------------------------------- training


def test_loss_is_the_noise_mse_and_drops_labels_one_by_one(nb, tiny):
    seen = []

    def model(x_t, t, y):
        seen.append((t, y))
        return torch.zeros_like(x_t)

    model.config, x_0 = tiny, torch.zeros(4000, 1, 2, 2)
    y, g = torch.full((4000,), 3), torch.Generator().manual_seed(0)
    loss = nb.diffusion_loss(model, x_0, y, nb.linear_schedule(1000), 0.1, g)
    assert abs(loss.item() - 1) < 0.05  # the noise has unit variance, and 0 was answered
    (t, labels), share = seen[0], (seen[0][1] == tiny.num_classes).float().mean().item()
    assert 0.07 < share < 0.13 and set(labels.tolist()) == {3, tiny.num_classes}
    assert t.min() <= 3 and t.max() >= 996 and abs(t.float().mean() - 499.5) < 25
    nb.diffusion_loss(model, x_0, y, nb.linear_schedule(1000), 0.0, g)
    assert (seen[1][1] == 3).all()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_snr_power_leads_from_the_mse_of_the_noise_to_that_of_the_image(nb, tiny, power):
    """Every image has its own weight: the ratio of both its errors, worked out from x_0_hat."""
    alpha_bar, x_0, seen = nb.linear_schedule(1000), torch.rand(4, 3, 4, 4) * 2 - 1, {}

    def model(x_t, t, y):
        seen.update(x_t=x_t, t=t, eps_hat=0.9 * x_t)
        return seen["eps_hat"]

    model.config = tiny
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        loss = nb.diffusion_loss(model, x_0, torch.zeros(4, dtype=torch.int64), alpha_bar, 0.0, g, snr_power=power)
        a = alpha_bar[seen["t"]].view(-1, 1, 1, 1)
        eps = (seen["x_t"].double() - a.sqrt() * x_0) / (1 - a).sqrt()
        x_0_hat = (seen["x_t"].double() - (1 - a).sqrt() * seen["eps_hat"]) / a.sqrt()
        of_noise, of_image = ((u - v).square().mean((1, 2, 3)) for u, v in ((seen["eps_hat"], eps), (x_0_hat, x_0)))
        assert loss.item() == pytest.approx((of_noise ** (1 - power) * of_image**power).mean().item(), rel=1e-3)


def test_the_last_step_is_drawn(nb, tiny):
    seen = []
    model = lambda x_t, t, y: seen.append(t) or x_t  # noqa: E731
    model.config = tiny
    nb.diffusion_loss(model, torch.zeros(500, 1, 1, 1), torch.zeros(500, dtype=torch.int64), nb.linear_schedule(3))
    assert set(seen[0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_batch_overfits(nb, tiny, optimizer):
    torch.manual_seed(0)
    config = nb.replace(tiny, optimizer=optimizer, train_steps=80, cooldown=0.0, learning_rate=3e-3, widths=(32, 64),
                        dropout=0.0)  # fmt: skip
    run, (x_0, y) = nb.new_run(config), nb.batch_at(0, images_of(nb, 8), 8, 0)
    x_0, alpha_bar = F.avg_pool2d(x_0, 8).repeat_interleave(8, 2).repeat_interleave(8, 3), nb.make_schedule(config)
    losses = [nb.train_step(run, x_0, y, alpha_bar).item() for _ in range(config.train_steps)]
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10])
    assert run.step == 80 and run.images_seen == 80 * config.batch_size


def test_stop_and_resume_equals_never_stopped(nb, tiny):
    images = images_of(nb)
    whole = nb.train(nb.replace(tiny, run_dir=tiny.run_dir + "-a"), images, images, progress=False)
    interrupted = nb.replace(tiny, run_dir=tiny.run_dir + "-b")
    original, calls = nb.train_step, []

    def stop_after_three(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*args)

    nb.train_step = stop_after_three
    try:
        part = nb.train(interrupted, images, images, progress=False)
    finally:
        nb.train_step = original
    assert part.step == 3 and len(part.losses) == 3 and part.history["loss"] == part.losses
    torch.manual_seed(99)  # the caller's random state must not matter
    resumed = nb.train(interrupted, images, images, resume=True, progress=False)
    assert resumed.step == whole.step and [m["step"] for m in resumed.milestones] == [0, 2, 5, 8]
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert whole.losses == resumed.losses


def test_the_stop_button_never_cuts_a_step_in_half(nb, tiny, monkeypatch):
    """SIGINT between the two optimisers: the step is finished first, and resuming is as if it had never come."""
    images, original, count = images_of(nb), nb.Muon.step, []
    whole = nb.train(nb.replace(tiny, run_dir=tiny.run_dir + "-a"), images, progress=False)

    def interrupted(self):
        original(self)
        count.append(1)
        if len(count) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(nb.Muon, "step", interrupted)
    config, handler = nb.replace(tiny, run_dir=tiny.run_dir + "-b"), signal.getsignal(signal.SIGINT)
    part = nb.train(config, images, progress=False)
    assert part.step == len(part.losses) == 3 and signal.getsignal(signal.SIGINT) is handler
    resumed = nb.train(config, images, resume=True, progress=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_resumed_run_tells_what_it_really_saw(nb, tiny, capsys):
    images = images_of(nb)
    nb.train(nb.replace(tiny, train_steps=3), images, progress=False)
    later = nb.replace(tiny, train_steps=5, batch_size=16, weight_decay=0.5)
    run = nb.train(later, nb.replace(images, source="others"), resume=True, progress=False)
    assert run.images_seen == 3 * 8 + 2 * 16 and run.sources == ["random", "others"]
    assert {group["weight_decay"] for o in run.optimizers for group in o.param_groups} == {0.5}
    nb.train(nb.replace(tiny, run_dir=tiny.run_dir + "-new"), images, resume=True, progress=False)
    assert "no checkpoint at" in capsys.readouterr().out


def test_a_full_disk_does_not_take_what_was_learned(nb, tiny, monkeypatch, capsys):
    def refuse(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(nb, "save_checkpoint", refuse)
    run = nb.train(tiny, images_of(nb), progress=False)
    assert run.step == tiny.train_steps and "No space left" in capsys.readouterr().out


def test_stopping_before_and_inside_a_stride_counts_every_finished_step(nb, tiny, monkeypatch):
    images, original, calls = images_of(nb), nb.train_step, []

    def stop_at(n):
        def step(*args):
            if len(calls) == n:
                raise KeyboardInterrupt
            calls.append(1)
            return original(*args)

        return step

    monkeypatch.setattr(nb, "STRIDE", {"cpu": 5})
    for n in (0, 3):
        calls.clear()
        monkeypatch.setattr(nb, "train_step", stop_at(n))
        run = nb.train(nb.replace(tiny, run_dir=f"{tiny.run_dir}-{n}"), images, progress=False)
        assert run.step == len(run.losses) == n and (n == 0 or run.seconds > 0)


def test_resumed_milestones_can_be_drawn(nb, tiny, monkeypatch):
    images, seen, original = images_of(nb), [], torch.load
    nb.train(tiny, images, images, progress=False)
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(k["map_location"]) or original(*a, **k))
    run = nb.train(tiny, images, images, resume=True, progress=False)
    assert seen == ["cpu"]  # so that what the figures draw is on the CPU, whatever the device
    assert all(v.device.type == "cpu" for m in run.milestones for v in m.values() if torch.is_tensor(v))


def test_training_leaves_the_random_state_and_repeats_itself(nb, tiny):
    images = images_of(nb)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = nb.train(tiny, images, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    second = nb.train(tiny, images, progress=False)
    assert first.losses == second.losses
    other = nb.train(nb.replace(tiny, seed=1), images, progress=False)
    assert other.losses != first.losses


def test_an_earlier_checkpoint_is_set_aside_and_not_overwritten(nb, tiny, capsys):
    images, path = images_of(nb), nb.checkpoint_path(tiny)
    nb.train(tiny, images, progress=False)
    kept = path.read_bytes()
    nb.train(nb.replace(tiny, seed=4), images, progress=False)
    assert (path.parent / "checkpoint-1.pt").read_bytes() == kept != path.read_bytes()
    assert "kept the earlier checkpoint.pt" in capsys.readouterr().out


def test_a_write_that_fails_leaves_the_old_file(nb, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half(part):
        Path(part).write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        nb.write_whole(path, half)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_damaged_or_foreign_checkpoint_is_named(nb, tiny):
    images, path = images_of(nb), nb.checkpoint_path(tiny)
    nb.train(tiny, images, progress=False)
    with pytest.raises(ValueError, match=r"made with widths = \(16, 32\), but this run has \(16, 16\)"):
        nb.train(nb.replace(tiny, widths=(16, 16)), images, resume=True, progress=False)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint.*move it away"):
        nb.train(tiny, images, resume=True, progress=False)
    assert path.stat().st_size == 1000  # and the damaged file is still the user's


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_last_good_checkpoint(nb, tiny):
    images = images_of(nb)
    nb.train(tiny, images, progress=False)
    good = nb.checkpoint_path(tiny).read_bytes()
    original = nb.train_step
    nb.train_step = lambda run, *args: original(run, *args) * float("nan")
    try:
        with pytest.raises(FloatingPointError, match="lower learning_rate"):
            nb.train(nb.replace(tiny, train_steps=20), images, resume=True, progress=False)
    finally:
        nb.train_step = original
    assert nb.checkpoint_path(tiny).read_bytes() == good


def test_learning_rate_warms_up_stays_and_falls_to_zero(nb, tiny):
    config = nb.replace(tiny, train_steps=100, warmup=10, cooldown=0.5, learning_rate=1.0)
    rates = [nb.learning_rate_at(s, config) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)
    assert nb.learning_rate_at(99, nb.replace(config, cooldown=0.0)) == 1.0


def test_moving_average_has_the_stated_half_life_and_copies_buffers(nb):
    ema, model = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    nn.init.zeros_(ema.weight)
    model.running_mean.fill_(7.0)
    for step in range(100_000, 100_010):
        nb.update_average(ema, model, step, half_life=10)
    torch.testing.assert_close(ema.weight, torch.full((2,), 0.5))
    assert (ema.running_mean == 7).all()
    early, late = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.zeros_(early.weight), nn.init.ones_(late.weight)
    nb.update_average(early, late, 1, half_life=1e9)
    assert early.weight.item() == pytest.approx(0.9)  # the random start is forgotten at once


def test_muon_orthogonalises(nb):
    g = torch.Generator().manual_seed(0)
    for shape in ((32, 32), (16, 144), (144, 16)):
        values = torch.linalg.svdvals(nb.orthogonalise([torch.randn(shape, generator=g)])[0])
        assert 0.6 < values.min() and values.max() < 1.25
    several = [torch.randn(shape, generator=g) for shape in ((16, 144), (32, 32), (144, 16), (16, 16), (16, 144))]
    for matrix, together in zip(several, nb.orthogonalise(several), strict=True):  # in one go as one by one
        assert together.shape == matrix.shape
        torch.testing.assert_close(together, nb.orthogonalise([matrix])[0], rtol=1e-3, atol=1e-4)
    p = nn.Parameter(torch.ones(4, 3, 3, 3))
    p.grad = torch.randn(p.shape, generator=g)
    before = p.detach().clone()
    nb.Muon([p], lr=0.1).step()
    moved = (p.detach() - before).flatten(1)
    assert (moved * p.grad.flatten(1)).sum() < 0  # downhill
    assert 0.5 < torch.linalg.svdvals(moved).mean() / (0.1 * 0.2 * 27**0.5) < 1.5


def test_every_parameter_has_exactly_one_optimizer(nb, tiny):
    model = nb.UNet(tiny)
    for name in ("muon", "adamw"):
        groups = nb.make_optimizers(model, nb.replace(tiny, optimizer=name))
        owned = [id(p) for o in groups for g in o.param_groups for p in g["params"]]
        assert sorted(owned) == sorted(id(p) for p in model.parameters())


def test_weights_travel_with_their_story(nb, tiny, tmp_path):
    run, path = nb.new_run(tiny), tmp_path / "w.safetensors"
    nb.save_weights(path, run.model, {"images_seen": 5, "story": "none"})
    model = nb.load_weights(path)
    assert model.facts == {"images_seen": 5, "story": "none"} and not model.training
    assert model.config == nb.replace(tiny, device="cpu", precision="fp32")
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=4e-3, atol=1e-8)
    assert path.stat().st_size < 2.2 * sum(p.numel() for p in model.parameters()) + 30_000
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read as weights"):
        nb.load_weights(path)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        nb.load_weights(tmp_path / "none.safetensors")


def test_weights_of_another_network_are_refused_in_one_line(nb, tiny, tmp_path):
    path = tmp_path / "w.safetensors"
    metadata = {"config": nb.json.dumps(nb.asdict(tiny)), "facts": "{}"}
    nb.save_file({"some.other.layer": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match="cannot be read as weights") as caught:
        nb.load_weights(path)
    assert "\n" not in str(caught.value)


def test_the_view_of_a_milestone_covers_the_schedule_it_is_given(nb, tiny):
    seen = nb.snapshot(nb.new_run(tiny), images_of(nb), nb.linear_schedule(100))
    assert 90 < seen["t"].max() < 100 and seen["x_t"].isfinite().all()


def test_training_continues_from_given_weights(nb, tiny):
    images, start = images_of(nb), nb.UNet(tiny)
    with torch.no_grad():
        start.out.bias.fill_(0.25)
    run = nb.train(nb.replace(tiny, train_steps=1, learning_rate=1e-9), images, init=start, progress=False)
    torch.testing.assert_close(run.network.out.bias, start.out.bias)
    with pytest.raises(ValueError, match="embed_dim"):
        nb.train(nb.replace(tiny, embed_dim=64), images, init=start, progress=False)


def test_compile_falls_back_when_there_is_no_compiler(nb, tiny, capsys, monkeypatch):
    model, (x_0, y) = nb.UNet(tiny), nb.batch_at(0, images_of(nb), 2, 0)
    wanted = model(x_0, y, y)

    def broken(self, *args, **kwargs):
        def call(*a, **k):
            raise RuntimeError("no compiler")

        self._compiled_call_impl = call

    monkeypatch.setattr(nn.Module, "compile", broken)
    nb.compile_in_place(model, x_0, y)
    assert "torch.compile does not work here" in capsys.readouterr().out
    assert torch.equal(model(x_0, y, y), wanted) and "_orig_mod" not in "".join(model.state_dict())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler on the CPU")
def test_compiled_gives_what_eager_gives(nb):
    model = awake(nb, nb.make_config("smoke", widths=(16,)))
    args = torch.randn(2, 3, 32, 32), torch.tensor([3, 900]), torch.tensor([1, 10])
    wanted = model(*args).detach()
    nb.compile_in_place(model, args[0], args[2])
    assert model._compiled_call_impl is not None
    torch.testing.assert_close(model(*args).detach(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_train_stop_resume_sample_and_classify(nb, tiny):
    config = nb.make_config("smoke", device="cuda", precision="bf16", run_dir=tiny.run_dir, train_steps=4)
    images = images_of(nb).to("cuda")
    nb.train(nb.replace(config, train_steps=2), images, images, progress=False)
    run = nb.train(config, images, images, resume=True, progress=False)
    assert run.step == 4 and all(loss > 0 for loss in run.losses)
    x_0 = nb.sample(run.model, torch.tensor([0, 1], device="cuda"), 3)
    assert x_0.is_cuda and nb.classify(run.model, x_0).labels.shape == (2,)


def test_noise_mse_by_band(nb, tiny):
    model = lambda x_t, t, y: torch.zeros_like(x_t) + (t >= 500).view(-1, 1, 1, 1)  # noqa: E731
    model.config = tiny
    errors = nb.noise_mse(model, images_of(nb), bands=4)
    torch.testing.assert_close(errors.mean(1), torch.tensor([1.0, 1.0, 2.0, 2.0]), rtol=0.03, atol=0)
    assert errors.shape == (4, len(images_of(nb))) and errors.unique().numel() == errors.numel()  # one each


def test_mean_interval_is_the_textbook_one_and_holds_the_mean_nineteen_times_in_twenty(nb):
    values = torch.arange(1.0, 26.0)  # mean 13, variance 25 * 26 / 12
    half = 1.96 * math.sqrt(25 * 26 / 12 / 25)
    assert nb.mean_interval(values) == pytest.approx([13, 13 - half, 13 + half], abs=1e-5)
    draws = torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))
    inside = sum(low <= 0 <= high for _, low, high in map(nb.mean_interval, draws))
    assert 930 <= inside <= 970


def test_quality_of_known_errors(nb):
    x_0 = torch.zeros(2, 3, 32, 32)
    got = nb.quality(x_0 + 0.2, x_0)  # 0.1 of the range [0, 1]
    assert got["MSE"] == pytest.approx(0.01, rel=1e-4) and got["PSNR"] == pytest.approx(20.0, abs=1e-3)
    assert nb.quality(x_0, x_0)["SSIM"] == pytest.approx(1.0)
