"""Settings, the network, training, checkpoints and weights."""

import json
import math
import os
import signal

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import images_of

WRONG = [
    (dict(train_step=5), "there is no setting 'train_step'"),
    (dict(train_steps=0), "train_steps = 0 must be above 0, or weights must name a file"),
    (dict(train_steps="many"), "train_steps = 'many' must be a whole number"),
    (dict(batch_size=0), "batch_size = 0 must be from 1"),
    (dict(schedule="sigmoid"), "schedule = 'sigmoid' must be one of cosine, linear"),
    (dict(device="tpu"), "device = 'tpu' is not present"),
    (dict(preset="fast"), "preset = 'fast' must be one of auto, cpu, gpu, smoke"),
    (dict(widths="64,128"), "widths = '64,128' must be a list"),
    (dict(attention=(7,)), "attention"),
    (dict(T=100, schedule="linear"), "T = 100 must be at least 500 with the linear schedule"),
    (dict(image_shape=(3, 33, 32)), r"image_shape = \(3, 33, 32\) must be divisible by 2"),
    (dict(sampling_steps=2000), "sampling_steps = 2000 must be at most T"),
    (dict(label_drop=0), "label_drop = 0.0 must be above 0"),
    (dict(weights="none.safetensors"), "there is no file 'none.safetensors'"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_a_mistake_is_named_in_one_sentence(nb, wrong, message):
    with pytest.raises(ValueError, match=message) as caught:
        nb.make_config(**{"preset": "smoke", "device": "cpu", **wrong})
    assert "\n" not in str(caught.value)


def test_presets_fill_in_what_is_not_given(nb, tmp_path, monkeypatch):
    assert nb.make_config("auto").preset == ("gpu" if torch.cuda.is_available() else "cpu")
    smoke = nb.make_config("smoke", train_steps=None, widths=[16, 32], attention=[], learning_rate=1)  # by papermill
    assert smoke.train_steps == nb.PRESETS["smoke"]["train_steps"] and smoke.widths == (16, 32)
    assert smoke.attention == () and type(smoke.learning_rate) is float
    (tmp_path / "w").write_bytes(b"")
    own = [nb.make_config("cpu", weights=str(tmp_path / "w"), train_steps=n).train_steps for n in (None, 7)]
    assert own == [0, 7]  # without a number, weights are used as they are
    monkeypatch.setattr(nb, "precisions", lambda device: ("fp16", "fp32"))
    assert nb.make_config("cpu", device="cpu").precision == "fp16"  # the fastest
    with pytest.raises(ValueError, match="precision = 'bf16' must be one of fp16, fp32 on cpu"):
        nb.make_config("cpu", device="cpu", precision="bf16")


def test_changed_settings_are_those_that_shape_training(nb):
    other = dict(guidance_scale=1.0, seed=5, precision="fp32", sampling_steps=9, run_dir="x", classify_images=3)
    assert nb.changed_settings(nb.make_config("cpu", device="cpu", **other)) == []
    shaping = dict(schedule="linear", train_steps=100, attention=(), flip=False, image_shape=(3, 16, 16))
    for name, value in shaping.items():
        assert nb.changed_settings(nb.make_config("cpu", device="cpu", **{name: value})) == [name]


# ----------------------------------------------------------------------------------------------- network
def awake(nb, config):
    """A UNet whose zeroed layers are random, so that every path can be seen in the output."""
    torch.manual_seed(0)
    model = nb.UNet(config).eval()
    for p in model.parameters():
        if p.abs().max() == 0:
            nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize(("shape", "widths"), [((1, 28, 20), (16, 24, 8)), ((4, 24, 40), (16, 24)), ((3, 7, 5), (16,))])
def test_images_of_any_divisible_size_do_not_mix_and_depend_on_time_and_label(nb, shape, widths):
    model = awake(nb, nb.make_config("smoke", image_shape=shape, widths=widths, attention=(0,)))
    x = torch.randn(1, *shape)
    t = torch.tensor([500, 500.5, 900, 500, 500])
    y = torch.tensor([3, 3, 3, 4, 10])  # 10 is the null label
    together = model(x.expand(5, -1, -1, -1), t, y)
    for i in range(5):
        torch.testing.assert_close(model(x, t[i : i + 1], y[i : i + 1])[0], together[i], atol=2e-5, rtol=1e-4)
        assert i == 0 or (together[i] - together[0]).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_what_the_last_layer_says_is_v(nb, tiny, schedule):
    """Salimans & Ho 2022: eps_hat = sqrt(1 - a) x_t + sqrt(a) v_hat; an untrained network says v_hat = 0."""
    model = nb.UNet(nb.replace(tiny, schedule=schedule))
    x = torch.randn(4, 3, 8, 8)
    t = torch.tensor([0, 1, 500, 999])
    a = nb.make_schedule(model.config)[t].float().view(-1, 1, 1, 1)
    for v in (0.0, 0.7):
        nn.init.constant_(model.out.bias, v)
        torch.testing.assert_close(model(x, t, t % 10), (1 - a).sqrt() * x + v * a.sqrt())


# ---------------------------------------------------------------------------------------------- training
def test_loss_is_the_noise_mse_drops_labels_one_by_one_and_draws_the_last_step(nb, tiny):
    seen = []

    def model(x_t, t, y):
        seen.append((t, y))
        return torch.zeros_like(x_t)

    model.config = tiny
    x_0 = torch.zeros(4000, 1, 2, 2)
    y = torch.full((4000,), 3)
    dice = torch.Generator().manual_seed(0)
    loss = nb.diffusion_loss(model, x_0, y, nb.linear_schedule(1000), 0.1, dice)
    assert abs(loss.item() - 1) < 0.05  # the noise has unit variance, and 0 was answered
    nb.diffusion_loss(model, x_0, y, nb.linear_schedule(3), 0.0, dice)
    assert 0.07 < (seen[0][1] == tiny.num_classes).float().mean() < 0.13
    assert set(seen[0][1].tolist()) == {3, tiny.num_classes} and set(seen[1][1].tolist()) == {3}
    assert abs(seen[0][0].float().mean() - 499.5) < 25 and set(seen[1][0].tolist()) == {0, 1, 2}


def test_the_shares_of_processes_make_the_same_loss_together(nb, tiny):
    model = awake(nb, tiny)
    x_0, y = nb.batch_at(0, images_of(nb), 8, 0)

    def loss(mine):
        dice = torch.Generator().manual_seed(1)
        return nb.diffusion_loss(model, x_0, y, nb.make_schedule(tiny), 0.5, dice, mine).item()

    shares = [loss(slice(0, 4)), loss(slice(4, 8))]
    assert sum(shares) / 2 == pytest.approx(loss(slice(None)), rel=1e-5) and shares[0] != shares[1]


@pytest.mark.parametrize(("optimizer", "rate"), [("muon", 5e-3), ("adamw", 2e-3)])
def test_one_batch_overfits(nb, tiny, optimizer, rate):
    """Eight images of random pixels are learned by heart: 0.6 is the least error for one who does not know them."""
    own = dict(optimizer=optimizer, learning_rate=rate, num_classes=1, flip=False, ema_half_life=5)
    run = nb.train(nb.replace(tiny, train_steps=100, batch_size=16, widths=(32,), **own), images_of(nb, 8, classes=1))
    t = torch.tensor([300, 400, 500, 600])  # sigma 0.2 to 0.55
    seen, _ = nb.noise_errors(run.model, images_of(nb, 8, classes=1), t)
    unseen, _ = nb.noise_errors(run.model, images_of(nb, 8, classes=1, seed=1), t)
    assert seen.mean() < 0.45 and unseen.mean() > 0.8 and run.images_seen == 1600


@pytest.mark.parametrize(("scale", "slope"), [(1.0, 1.0), (0.8, 1.25), (1.25, 0.8)])
def test_noise_errors_and_the_slope_of_known_estimates(nb, tiny, scale, slope):
    images = images_of(nb, 60)

    def model(x_t, t, y):  # it knows x_0, and answers `scale` times the noise
        a = nb.make_schedule(tiny)[t].float().view(-1, 1, 1, 1)
        return scale * (x_t - a.sqrt() * nb.to_unit(images.images)) / (1 - a).sqrt()

    model.config = tiny
    errors, found = nb.noise_errors(model, images, torch.tensor([100, 500, 900]))
    assert errors.shape == (3, 60) and errors.mean().item() == pytest.approx((1 - scale) ** 2, abs=3e-3)
    assert found.tolist() == pytest.approx([slope] * 3, abs=3e-3)


def test_training_goes_on_from_given_weights_on_images_and_a_network_that_fit(nb, tiny):
    start = awake(nb, tiny)
    run = nb.train(nb.replace(tiny, train_steps=1, learning_rate=1e-9), images_of(nb), init=start)
    for name, value in start.state_dict().items():
        torch.testing.assert_close(run.network.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    for other in (dict(embed_dim=64), dict(attention=()), dict(schedule="linear")):
        with pytest.raises(ValueError, match=f"made with {next(iter(other))} = "):
            nb.train(nb.replace(tiny, **other), images_of(nb), init=start)
    with pytest.raises(ValueError, match="weights: made with flip = True, not False"):  # used as they are
        nb.train(nb.replace(tiny, flip=False, weights="x", train_steps=0), images_of(nb), init=start)
    for images in (images_of(nb, shape=(3, 16, 16)), images_of(nb, classes=3)):
        with pytest.raises(ValueError, match="the images do not fit"):
            nb.train(tiny, images)


def test_the_rate_warms_up_stays_and_falls_to_zero_and_the_average_has_its_half_life(nb, tiny):
    config = nb.replace(tiny, train_steps=100, warmup=10, cooldown=0.5, learning_rate=1.0)
    rates = [nb.learning_rate_at(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9:51] == [1.0] * 42
    assert rates[75] == pytest.approx(0.5) and rates[99] == pytest.approx(0.02)
    average, network = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.ones_(network.weight)
    for steps, half_life, left in ((range(100_000, 100_010), 10, 0.5), ((1,), 1e9, 0.1)):  # the start is soon forgotten
        nn.init.zeros_(average.weight)
        for step in steps:
            nb.update_average(average, network, step, half_life)
        assert average.weight.item() == pytest.approx(1 - left)


def test_newton_schulz_orthogonalises_and_muon_steps_as_that_of_torch(nb):
    dice = torch.Generator().manual_seed(0)
    matrices = F.normalize(torch.randn(3, 32, 144, generator=dice), dim=(1, 2))
    near = nb.newton_schulz(matrices @ matrices.transpose(1, 2)) @ matrices
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert F.cosine_similarity(near.flatten(1), (u @ v).flatten(1)).min() > 0.97
    ours = [nn.Parameter(torch.ones(shape)) for shape in ((4, 3, 3, 3), (64, 8), (8, 64))]
    theirs = [nn.Parameter(p.detach().flatten(1).clone()) for p in ours]  # torch's takes matrices only, in bf16
    optimizers = nb.Muon(ours, lr=0.1), torch.optim.Muon(theirs, 0.1, 0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=dice)
            q.grad = p.grad.flatten(1)
        optimizers[0].step()
        optimizers[1].step()
    assert all((p.flatten(1) - q).norm() < 0.03 * (q - 1).norm() for p, q in zip(ours, theirs))


@pytest.mark.parametrize(("name", "count"), [("muon", 2), ("adamw", 1)])
def test_every_parameter_has_exactly_one_optimizer(nb, tiny, name, count):
    model = nb.UNet(tiny)
    optimizers = nb.make_optimizers(model, nb.replace(tiny, optimizer=name))
    owned = [id(p) for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters()) and len(optimizers) == count


# ------------------------------------------------------------------------------------ stop and resume
def after_each_step(nb, monkeypatch, act) -> None:
    """Let act(run, loss) follow every training step; what it returns is the loss, if it is not None."""
    original = nb.train_step

    def changed(run, *args):
        loss = original(run, *args)
        answer = act(run, loss)
        return loss if answer is None else answer

    monkeypatch.setattr(nb, "train_step", changed)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(nb, tiny, monkeypatch, precision):
    images = images_of(nb)
    config = nb.replace(tiny, precision=precision)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = nb.train(config, images, images)
    assert torch.equal(before, torch.get_rng_state()) and whole.scaler.is_enabled() == (precision == "fp16")
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:  # the stop button
        after_each_step(nb, patch, lambda run, loss: signal.raise_signal(signal.SIGINT) if run.step == 3 else None)
        part = nb.train(config, images, images)
    assert part.step == len(part.losses) == 3 and signal.getsignal(signal.SIGINT) is handler
    nb.save_checkpoint(nb.checkpoint_path(config), part)
    torch.manual_seed(99)  # the caller's random state must not matter
    resumed = nb.train(config, images, images, resume=True)
    assert resumed.step == 8 and resumed.losses == whole.losses and all(map(math.isfinite, whole.losses))
    for part in ("network", "model"):
        theirs = getattr(whole, part).state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in getattr(resumed, part).state_dict().items())
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()
    assert [step for step, _ in resumed.milestones] == [step for step, _ in whole.milestones] == [0, 2, 5, 8]


def test_resuming_counts_what_was_seen_and_adopts_the_precision_of_the_checkpoint_or_refuses_it(nb, tiny, monkeypatch):
    first = nb.train(nb.replace(tiny, train_steps=3, precision="bf16"), images_of(nb), resume=True)  # from nothing
    nb.save_checkpoint(nb.checkpoint_path(tiny), first)
    run = nb.train(nb.replace(tiny, train_steps=5, batch_size=16), images_of(nb), resume=True)
    assert run.images_seen == 3 * 8 + 2 * 16 and run.step == 5 == len(run.losses)
    assert run.config.precision == run.model.config.precision == "bf16"
    monkeypatch.setattr(nb, "precisions", lambda device: ("fp32",))
    with pytest.raises(ValueError, match="bf16, which cpu here cannot"):
        nb.train(tiny, images_of(nb), resume=True)


def test_resuming_on_other_images_or_from_other_weights_is_refused(nb, tiny):
    images = images_of(nb)
    nb.save_checkpoint(nb.checkpoint_path(tiny), nb.train(nb.replace(tiny, train_steps=3), images))
    with pytest.raises(ValueError, match="is of .*, not of other images: set resume = False"):
        nb.train(tiny, nb.replace(images, source="other images"), resume=True)
    for name, value in (("weights", "mine.safetensors"), ("test_images", 7)):
        with pytest.raises(ValueError, match=f"made with {name} = "):
            nb.train(nb.replace(tiny, **{name: value}), images, resume=True)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("where", ["stem.weight", "middle.0.conv1.weight"])  # AdamW's and Muon's
def test_in_fp16_a_step_with_an_infinite_gradient_is_skipped_and_the_scale_falls(nb, tiny, where, value):
    """It is skipped by both optimizers, whichever has the parameter."""
    run = nb.new_run(nb.replace(tiny, precision="fp16"))
    batch = *nb.batch_at(0, images_of(nb), 8, 0), nb.make_schedule(tiny)
    nb.train_step(run, *batch)
    before = {name: p.detach().clone() for name, p in run.network.named_parameters()}
    scale = run.scaler.get_scale()
    hook = run.network.get_parameter(where).register_hook(lambda gradient: gradient * value)
    nb.train_step(run, *batch)
    hook.remove()
    assert [name for name, p in run.network.named_parameters() if not torch.equal(p, before[name])] == []
    assert run.scaler.get_scale() < scale and math.isfinite(nb.train_step(run, *batch).item())
    assert not torch.equal(run.network.stem.weight, before["stem.weight"])


# ---------------------------------------------------------------------------- checkpoints and weights
@pytest.mark.parametrize("what", ["nan", "inf", "network", "model"])  # a loss, or weights
def test_what_is_not_finite_stops_the_run_names_the_step_and_is_not_saved(nb, tiny, monkeypatch, what):
    def spoil(run, loss):
        if run.step == 5 and what in ("network", "model"):
            nn.init.constant_(getattr(run, what).out.bias, math.nan)
        return loss * float(what) if run.step == 5 and what in ("nan", "inf") else None

    after_each_step(nb, monkeypatch, spoil)
    config = nb.replace(tiny, precision="fp16" if what == "model" else "fp32")
    with pytest.raises(FloatingPointError, match="step 5: lower learning_rate"):
        nb.train(config, images_of(nb), save_every=-1)
    assert torch.load(nb.checkpoint_path(tiny), weights_only=True)["step"] == 2


def test_in_fp16_an_early_infinite_loss_does_not_stop_later_checkpoints(nb, tiny, monkeypatch):
    after_each_step(nb, monkeypatch, lambda run, loss: loss * math.inf if run.step == 1 else None)
    nb.train(nb.replace(tiny, precision="fp16"), images_of(nb), save_every=-1)
    assert torch.load(nb.checkpoint_path(tiny), weights_only=True)["step"] == 8


def test_a_full_disk_ends_no_training_and_costs_no_earlier_file(nb, tiny, monkeypatch, capsys):
    def refuse(state, part):
        part.write_text("half a file")
        raise OSError("No space left on device")

    path = nb.checkpoint_path(tiny)
    nb.write_whole(path, lambda part: part.write_text("old"))
    monkeypatch.setattr(torch, "save", refuse)
    run = nb.train(tiny, images_of(nb), resume=False, save_every=-1)
    assert run.step == 8 and "No space left" in capsys.readouterr().out
    assert os.listdir(path.parent) == ["checkpoint.old"] and path.with_suffix(".old").read_text() == "old"


def test_an_earlier_checkpoint_becomes_old_unless_an_old_one_has_seen_more(nb, tiny, capsys):
    path = nb.checkpoint_path(tiny)
    old = path.with_suffix(".old")
    for seen, kept, word in ((100, 100, "is now"), (200, 200, "is now"), (50, 200, "stays")):
        run = nb.new_run(tiny)
        run.images_seen = seen
        nb.save_checkpoint(path, run)
        nb.train(nb.replace(tiny, train_steps=1), images_of(nb))
        said = capsys.readouterr().out
        assert nb.images_in(old) == kept and str(old) in said and word in said
        assert path.exists() == (word == "stays")  # until the new run writes its own
    nb.train(nb.replace(tiny, train_steps=0, weights="given"), images_of(nb), init=run.model)  # moves nothing
    assert nb.images_in(old) == 200 and nb.images_in(path) == 50


def test_a_damaged_or_foreign_checkpoint_is_named_in_one_sentence(nb, tiny):
    path = nb.checkpoint_path(tiny)
    nb.save_checkpoint(path, nb.new_run(tiny))
    for other in (dict(widths=(24,)), dict(attention=()), dict(optimizer="adamw"), dict(T=500)):
        with pytest.raises(ValueError, match=f"checkpoint.pt: made with {next(iter(other))} = "):
            nb.train(nb.replace(tiny, **other), images_of(nb), resume=True)
    os.truncate(path, 1000)
    with pytest.raises(ValueError, match="checkpoint.pt cannot be read .*move it away") as caught:
        nb.train(tiny, images_of(nb), resume=True)
    assert "\n" not in str(caught.value) and path.stat().st_size == 1000  # the file is still the user's


def test_weights_travel_with_their_story_and_compute_much_the_same_in_sixteen_bits(nb, tiny, tmp_path):
    model = awake(nb, tiny)
    path = tmp_path / "deep" / "w.safetensors"
    nb.save_weights(path, model, {"images_seen": 5, "data": "none"})
    loaded = nb.load_weights(path)
    assert loaded.facts == {"images_seen": 5, "data": "none"} and loaded.config == tiny and not loaded.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-3, atol=1e-7)
    args = torch.randn(4, 3, 8, 8), torch.tensor([0, 10, 500, 999]), torch.tensor([0, 1, 2, 10])
    for precision in ("bf16", "fp16"):
        off = nb.load_weights(path, precision=precision)(*args) - loaded(*args)
        assert off.dtype == torch.float32 and 0 < off.norm() / loaded(*args).norm() < 0.03
    assert path.stat().st_size < 2.2 * sum(p.numel() for p in model.parameters()) + 30_000
    other = tmp_path / "deep" / "other.safetensors"
    nb.save_file({"some.other.layer": torch.zeros(1)}, other, {"config": json.dumps(nb.asdict(tiny)), "facts": "{}"})
    os.truncate(path, 5000)
    for bad in (path, other, tmp_path / "none.safetensors"):
        with pytest.raises(ValueError, match=f"{bad.name} cannot be read") as caught:
            nb.load_weights(bad)
        assert "\n" not in str(caught.value)


def test_compile_falls_back_when_there_is_no_compiler(nb, tiny, capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda model: refuse)
    assert type(nb.compiled(nb.UNet(tiny), *nb.batch_at(0, images_of(nb), 2, 0))) is nb.UNet
    assert "torch.compile does not work here" in capsys.readouterr().out


def test_a_batch_too_large_for_the_gpu_is_not_taken_for_a_missing_compiler(nb, tiny, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda model: refuse)
    with pytest.raises(ValueError, match="2 images do not fit into the GPU's memory: lower batch_size"):
        nb.compiled(nb.UNet(tiny), *nb.batch_at(0, images_of(nb), 2, 0))
