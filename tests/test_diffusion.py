"""Schedules, noising, embedding, solvers, denoiser and classifier: against diffusers and against exact mathematics."""

import itertools
import signal

import diffusers
import numpy as np
import pytest
import torch
from conftest import images_of
from diffusers.models.embeddings import get_timestep_embedding


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sigma_at(nb, t, alpha_bar):
    return (-0.5 * nb.at_step(torch.as_tensor(t), torch.logit(alpha_bar))).exp()


# --------------------------------------------------------------------------------- schedules and embedding
@pytest.mark.parametrize("T", [500, 1000])
def test_the_linear_schedule_is_that_of_diffusers(nb, T):
    ours = nb.make_schedule(nb.make_config("smoke", schedule="linear", T=T))
    oracle = diffusers.DDPMScheduler(T, beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    assert ours.dtype == torch.float64 and torch.equal(ours, nb.linear_schedule(T))
    torch.testing.assert_close(ours, oracle.double(), rtol=2e-4, atol=1e-6)  # theirs is a float32 product


@pytest.mark.parametrize("T", [50, 1000])
def test_the_shifted_cosine_is_that_of_simple_diffusion(nb, T):
    """Hoogeboom et al. 2023, appendix: logsnr_schedule_cosine_shifted, with 0.4 = image_d / noise_d."""
    ours = nb.make_schedule(nb.make_config("smoke", T=T))
    assert ours.dtype == torch.float64 and ours.shape == (T,) and (ours.diff() < 0).all()
    assert ((1 - ours) / ours).sqrt()[[0, -1]].tolist() == pytest.approx([0.005, 100])
    shift = 2 * np.log(1 / 0.4)
    t_min, t_max = (np.arctan(np.exp(-0.5 * (-2 * np.log(sigma) - shift))) for sigma in (0.005, 100))
    logsnr = -2 * np.log(np.tan(t_min + np.linspace(0, 1, T) * (t_max - t_min))) + shift
    np.testing.assert_allclose(torch.logit(ours).numpy(), logsnr, rtol=1e-9, atol=1e-9)


def test_q_sample_has_the_stated_moments(nb):
    alpha_bar = nb.linear_schedule(1000)
    t = torch.tensor([0, 250, 999])
    x_0 = torch.full((300_000, 1, 1, 1), 0.7)
    x_t = nb.q_sample(x_0, t.repeat(100_000), torch.randn(x_0.shape, generator=dice()), alpha_bar).view(-1, 3).double()
    assert (
        (x_t.mean(0) - 0.7 * alpha_bar[t].sqrt()).abs() < 0.016 * (1 - alpha_bar[t]).sqrt()
    ).all()  # 5 standard errors
    torch.testing.assert_close(x_t.std(0), (1 - alpha_bar[t]).sqrt(), rtol=0.011, atol=0)


def test_the_timestep_embedding_is_that_of_diffusers(nb):
    t = torch.tensor([0, 1, 17, 499.5, 999])
    torch.testing.assert_close(nb.timestep_embedding(t, 64), get_timestep_embedding(t, 64, downscale_freq_shift=1))


# ---------------------------------------------------------------------------------------------- solvers
class Wavy:
    """A nonlinear stand-in for a network, smooth and class dependent."""

    def __init__(self, config, speed=1.0):
        self.config = config
        self.speed = speed

    def __call__(self, x_t, t, y):
        wave = 0.9 * torch.sin(x_t + 0.3 * y.view(-1, 1, 1, 1))
        return wave + 0.1 * torch.cos(self.speed * t / 300).view(-1, 1, 1, 1)


@pytest.fixture
def wavy(nb):
    return Wavy(nb.make_config("smoke", image_shape=(3, 8, 8)))


LABELS = torch.tensor([0, 3, 9])
LINEAR = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
MULTISTEP = dict(thresholding=True, sample_max_value=1.0, final_sigmas_type="zero")  # this thresholding is the clamp


def walk(scheduler, model, **settings):
    """The noise that diffusers' scheduler starts from, and the images it comes to."""
    x = first = torch.randn(3, 3, 8, 8, generator=dice(4))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(3), LABELS), t, x, **settings).prev_sample
    assert x.std() > 0.1  # the comparison is not one of constants
    return first, x


def betas_of(alpha_bar) -> list:
    return (1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]])).tolist()


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_and_ddpm_in_few_steps_are_those_of_diffusers(nb, wavy, eta):
    scheduler = diffusers.DDIMScheduler(**LINEAR, timestep_spacing="trailing", clip_sample=True, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    first, x = walk(scheduler, wavy, eta=eta, use_clipped_model_output=True, generator=dice(5))
    ours = nb.solve(wavy, first, LABELS, scheduler.timesteps, nb.linear_schedule(1000), eta=eta, generator=dice(5))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("t", [list(range(999, 0, -50)), [999, 800, 799, 500, 130, 40, 7]])
def test_the_second_order_solver_is_that_of_diffusers_on_any_steps(nb, wavy, t):
    scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR, **MULTISTEP)
    scheduler.set_timesteps(timesteps=t)
    first, x = walk(scheduler, wavy)
    ours = nb.solve(wavy, first, LABELS, torch.tensor(t), nb.linear_schedule(1000), order=2)
    torch.testing.assert_close(ours, x, rtol=0, atol=5e-4)


def test_fractional_steps_on_the_default_schedule_are_those_of_diffusers_karras_sigmas(nb, wavy):
    alpha_bar = nb.cosine_schedule(1000)
    own = dict(trained_betas=betas_of(alpha_bar), use_karras_sigmas=True)
    scheduler = diffusers.DPMSolverMultistepScheduler(1000, **own, **MULTISTEP)
    scheduler.set_timesteps(20)
    timeless = Wavy(wavy.config, speed=0)  # diffusers rounds t
    first, x = walk(scheduler, timeless)
    t = nb.timesteps(alpha_bar, 20, 100, 0.005)
    torch.testing.assert_close(t, scheduler.timesteps.double(), rtol=0, atol=1)
    ours = nb.solve(timeless, first, LABELS, t, alpha_bar, order=2)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("schedule", "T"), [("linear", 500), ("cosine", 50)])
def test_ddpm_over_all_steps_is_the_ancestral_sampler_of_diffusers(nb, wavy, schedule, T):
    model = Wavy(nb.replace(wavy.config, T=T, schedule=schedule))
    scheduler = diffusers.DDPMScheduler(T, trained_betas=betas_of(nb.make_schedule(model.config)), clip_sample=True)
    scheduler.set_timesteps(T)
    fresh = dice(4)
    torch.randn(3, 3, 8, 8, generator=fresh)  # as `sample` draws its first noise from the same generator
    _, x = walk(scheduler, model, generator=fresh)
    ours = nb.sample(model, LABELS, T, "ddpm", generator=dice(4))
    torch.testing.assert_close(ours, x, rtol=0, atol=2e-4)


# ----------------------------------------------------------------------------------- steps and guidance
def test_steps_are_spaced_as_in_edm(nb):
    """Karras et al. 2022, eq. 5, which diffusers has too."""
    alpha_bar = nb.cosine_schedule(1000)
    found = sigma_at(nb, nb.timesteps(alpha_bar, 20), alpha_bar).tolist()
    assert found == pytest.approx((np.linspace(80 ** (1 / 7), 0.02 ** (1 / 7), 20) ** 7).tolist())
    edm = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.02, sigma_max=80)
    edm.set_timesteps(20)
    assert found == pytest.approx(edm.sigmas[:-1].tolist(), rel=1e-4)


@pytest.mark.parametrize(("schedule", "T"), [("cosine", 1000), ("cosine", 60), ("linear", 1000), ("linear", 500)])
def test_steps_never_repeat_on_any_schedule_and_are_all_for_steps_of_T(nb, wavy, schedule, T):
    """The linear schedule of 500 steps ends at sigma 12, below the 80 of EDM."""
    model = Wavy(nb.replace(wavy.config, schedule=schedule, T=T))
    for steps in (1, 7, 20, T - 1):
        t = nb.timesteps(nb.make_schedule(model.config), steps)
        assert len(t) == steps and t[0] <= T - 1 and t[-1] >= 0 and (t.diff() < 0).all()
    assert nb.sample(model, LABELS, 20).isfinite().all()
    _, trace = nb.sample(model, LABELS, T, "ddpm", return_trajectory=True)
    assert [t for t, _, _ in trace] == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("w", [0, 0.5, 1, 1.5, 4])
def test_guidance_is_two_passes_and_exaggerates_only_inside_its_interval(nb, wavy, w):
    calls = []
    null = wavy.config.num_classes

    def counted(x_t, t, y):
        calls.append((t[0].item(), y[0].item()))
        return wavy(x_t, t, y)

    counted.config = wavy.config
    _, trace = nb.sample(counted, LABELS, 12, guidance_scale=w, generator=dice(1), return_trajectory=True)
    steps = [step for step, _, _ in trace]
    inside = [t for t in steps if 0.3 <= sigma_at(nb, t, nb.make_schedule(wavy.config)) <= 3]
    assert 1 < len(inside) < 12
    guided = steps if w < 1 else inside if w > 1 else []  # to ignore the label works everywhere
    assert [t for t, label in calls if label == null] == pytest.approx(guided)
    assert [t for t, label in calls if label == 0] == pytest.approx(steps)
    for step, x_t, x_0_hat in trace:
        t = torch.full((3,), step)
        without = wavy(x_t, t, torch.full_like(LABELS, null))
        eps_hat = without + (w if step in guided else 1) * (wavy(x_t, t, LABELS) - without)
        a = 1 / (1 + sigma_at(nb, step, nb.make_schedule(wavy.config)) ** 2)
        wanted = ((x_t - (1 - a).sqrt() * eps_hat) / a.sqrt()).clamp(-1, 1)
        torch.testing.assert_close(x_0_hat, wanted.float(), rtol=1e-3, atol=1e-3)


def test_the_same_generator_draws_the_same_images_and_no_noise_is_added_at_the_end(nb, wavy):
    again = [nb.sample(wavy, LABELS, 6, "ddpm", generator=dice(1)) for _ in range(2)]
    x_0, trace = nb.sample(wavy, LABELS, 6, "ddim", eta=1.0, generator=dice(1), return_trajectory=True)
    assert torch.equal(*again) and torch.equal(x_0, again[0]) and torch.equal(trace[-1][2], x_0)


@pytest.mark.parametrize("wrong", [{"solver": "euler"}, {"steps": 0}, {"steps": 1001}, {"eta": 2.0}])
def test_sample_refuses_what_cannot_work(nb, wavy, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        nb.sample(wavy, LABELS, **wrong)
    with pytest.raises(ValueError, match="labels"):
        nb.sample(wavy, torch.tensor([11]))


# ------------------------------------------------------------------------------- the exact Gaussian case
class Gaussian:
    """The ideal eps_hat when class y is N(mean_y, covariance) over all pixels."""

    def __init__(self, nb, config, means, covariance):
        self.nb = nb
        self.config = config
        self.means = means.double()
        self.covariance = covariance.double()
        self.values, self.vectors = torch.linalg.eigh(self.covariance)
        self.alpha_bar = nb.make_schedule(config)

    def __call__(self, x_t, t, y):
        a = self.nb.at_step(t.double(), torch.logit(self.alpha_bar)).sigmoid()[:, None]
        mean = self.means[y.clamp(max=len(self.means) - 1)]
        centred = (x_t.flatten(1).double() - a.sqrt() * mean) @ self.vectors
        # eps_hat = -sqrt(1 - a) * score, the score of N(sqrt(a) mean, a C + (1 - a) I)
        eps_hat = (1 - a).sqrt() * (centred / (a * self.values + 1 - a)) @ self.vectors.T
        return eps_hat.view(x_t.shape).to(x_t.dtype)

    def posterior(self, noisy, sigma: float):
        """Mean (B, D) and covariance (D, D) of the clean image, given noisy (B, 1, H, W)."""
        gain = self.covariance @ torch.linalg.inv(self.covariance + sigma**2 * torch.eye(len(self.values)))
        mean = self.means[0] + (noisy.flatten(1).double() - self.means[0]) @ gain.T
        return mean, self.covariance - gain @ self.covariance


@pytest.fixture
def gaussian(nb):
    config = nb.make_config("smoke", image_shape=(1, 2, 2), num_classes=1, T=300)
    root = torch.randn(4, 4, generator=dice(0)) * 0.08
    return Gaussian(nb, config, torch.tensor([[0.2, -0.1, 0.0, 0.15]]), root @ root.T + 0.004 * torch.eye(4))


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 300), ("ddim", 200), ("dpm++", 60)])
def test_samples_have_the_right_mean_and_covariance(nb, gaussian, solver, steps):
    y = torch.zeros(20_000, dtype=torch.int64)
    x = nb.sample(gaussian, y, steps, solver, generator=dice(0)).flatten(1).double()
    torch.testing.assert_close(x.mean(0), gaussian.means[0], rtol=0, atol=0.006)
    torch.testing.assert_close(torch.cov(x.T), gaussian.covariance, rtol=0.08, atol=8e-4)


@pytest.mark.parametrize("sigma", [1e-9, 0.02, 0.1, 0.37, 1.0])
def test_denoise_is_the_posterior_mean(nb, gaussian, sigma):
    noisy = torch.randn(50, 1, 2, 2, generator=dice(1)) * 0.1
    wanted, _ = gaussian.posterior(noisy, sigma)
    torch.testing.assert_close(nb.denoise(gaussian, noisy, sigma).flatten(1).double(), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [200, 300])  # 300 is T
def test_a_draw_has_the_posterior_mean_and_covariance(nb, gaussian, steps):
    noisy = torch.tensor([0.3, -0.2, 0.1, 0.0]).view(1, 1, 2, 2)
    mean, covariance = gaussian.posterior(noisy, 0.15)
    many = noisy.expand(20_000, -1, -1, -1)
    x = nb.denoise(gaussian, many, 0.15, draw_steps=steps, generator=dice(2)).flatten(1).double()
    torch.testing.assert_close(x.mean(0), mean[0], rtol=0, atol=0.005)
    torch.testing.assert_close(torch.cov(x.T), covariance, rtol=0.1, atol=5e-4)


def test_denoise_refuses_what_cannot_be(nb, gaussian):
    noisy = torch.zeros(1, 1, 2, 2)
    for sigma in (0, -1, 25):
        with pytest.raises(ValueError, match="sigma = .* must be above 0"):
            nb.denoise(gaussian, noisy, sigma)
    for other in (noisy.byte(), noisy.double(), noisy.numpy()):
        with pytest.raises(ValueError, match="float32 tensor"):
            nb.denoise(gaussian, other, 0.1)


def test_a_picture_in_tiles_is_the_posterior_mean_everywhere(nb, gaussian):
    """With independent pixels the exact posterior mean is the same in every tile, so the average must be it, too."""
    config = nb.replace(gaussian.config, image_shape=(1, 4, 4))
    model = Gaussian(nb, config, torch.full((1, 16), 0.1), torch.eye(16) * 0.04)
    for shape in ((1, 9, 14), (1, 4, 4), (1, 12, 5), (1, 1, 3)):
        noisy = 0.1 + 0.2 * torch.randn(shape, generator=dice(0))
        wanted = 0.1 + (noisy - 0.1) * 0.04 / (0.04 + 0.3**2)
        torch.testing.assert_close(nb.denoise_picture(model, noisy, 0.3), wanted, atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match=r"must be \(1, height, width\)"):
        nb.denoise_picture(model, torch.zeros(3, 9, 9), 0.3)


# ----------------------------------------------------------------------------------------- classification
@pytest.mark.parametrize(("schedule", "flip"), [("cosine", True), ("cosine", False), ("linear", False)])
def test_classify_decides_like_bayes(nb, schedule, flip):
    """Round classes: a pair of noises cancels all but |x_0 - mean|², so that every decision is exact.

    Mirrored pairs do so where the means are their own mirror images; without them the means may be any.
    """
    config = nb.make_config("smoke", image_shape=(1, 4, 4), schedule=schedule, flip=flip)
    means = torch.randn(10, 1, 4, 4, generator=dice(0)) * 0.1
    means = ((means + means.flip(3)) / 2**0.5 if flip else means).flatten(1)
    truth = torch.arange(300) % 10
    x_0 = means[truth] + 0.02**0.5 * torch.randn(300, 16, generator=dice(1))
    distance = torch.cdist(x_0, means).square()
    clear = distance.topk(2, largest=False).values.diff()[:, 0] > 1e-4  # beyond rounding
    verdict = nb.classify(Gaussian(nb, config, means, torch.eye(16) * 0.02), x_0.view(-1, 1, 4, 4))
    assert torch.equal(verdict.labels[clear], distance.argmin(1)[clear]) and clear.float().mean() > 0.98
    assert 0.3 < (verdict.labels == truth).float().mean() < 0.95 and verdict.evaluations == 94


EVALUATIONS = {1: 22, 2: 44, 3: 48, 10: 94, 100: 814}  # 2 (2 k + 2 k/2 + 3 k/3 + 4 · 2), two labels at least


@pytest.mark.parametrize("k", EVALUATIONS)
def test_successive_halving_by_hand(nb, k):
    """The same on a table of errors, image by image and in plain Python."""
    table = torch.rand(20, 11, k, generator=dice(k), dtype=torch.float64)

    def errors(labels, number):
        return table[:, number].gather(1, labels)

    found = nb.successive_halving(errors, torch.arange(k).expand(20, -1))
    assert found.evaluations == EVALUATIONS[k]
    for image, label in zip(table.cumsum(1).tolist(), found.labels.tolist()):
        left = range(k)
        for size, number in ((max(2, k // 2), 1), (max(2, k // 3), 3), (2, 6), (1, 10)):
            left = sorted(left, key=image[number].__getitem__)[:size]
        assert [label] == left


def test_label_errors_of_large_images_come_in_batches_that_fit(nb):
    """And are those of one image under one label at a time, with the mirrored pair written out."""
    sizes = []

    def model(x_t, t, y):
        sizes.append(len(y))
        return x_t * (y.view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000) / 5

    model.config = nb.make_config("smoke", device="cpu")
    x_0 = torch.rand(2, 1, 400, 410, generator=dice(0)) * 2 - 1
    labels = torch.tensor([[0, 3, 4, 9], [1, 2, 3, 4]])
    errors = nb.label_errors(model, x_0, labels, 700, seed=3)
    assert max(sizes) == 3 and sum(sizes) == 16
    eps = torch.randn(1, 1, 400, 410, generator=dice(3))
    a = nb.make_schedule(model.config)[700]
    for b, k in itertools.product(range(2), range(4)):
        pair = ((x_0[b], eps[0]), (x_0[b].flip(2), -eps[0].flip(2)))
        off = [(a.sqrt() * x + (1 - a).sqrt() * e) * (labels[b, k] + 0.7) / 5 - e for x, e in pair]
        assert errors[b, k].item() == pytest.approx(torch.stack(off).square().mean().item(), rel=1e-4)


def test_a_stopped_evaluation_goes_on_and_one_of_other_weights_or_images_is_refused(nb, tiny, tmp_path, monkeypatch):
    model = nb.UNet(nb.replace(tiny, num_classes=2)).eval()
    torch.nn.init.normal_(model.out.weight, std=0.1)
    images = images_of(nb, 25, classes=2)
    path = tmp_path / "deep" / "done.npz"
    original = nb.classify
    wanted = original(model, nb.to_unit(images.images))
    asked = []

    def counted(model, x_0, **settings):
        asked.append(len(x_0))
        if asked == [10]:
            signal.raise_signal(signal.SIGINT)  # the stop button, during the first part
        return original(model, x_0, **settings)

    monkeypatch.setattr(nb, "classify", counted)
    monkeypatch.setitem(nb.BAR, "disable", True)  # as TQDM_DISABLE=1 does
    assert len(nb.evaluate_classifier(model, images, path, part=10).labels) == 10 and asked == [10]
    for _ in range(2):  # the second time nothing is left to do
        whole = nb.evaluate_classifier(model, images, path, part=10)
        assert asked == [10, 10, 5] and whole.evaluations == 44 and torch.equal(whole.labels, wanted.labels)
    assert [file.name for file in path.parent.iterdir()] == ["done.npz"]
    others = images_of(nb, 25, seed=1), images.subset(20), images.subset(25, seed=5)  # the last only in another order
    for changed in ((nb.UNet(model.config), images), *[(model, other) for other in others]):
        with pytest.raises(ValueError, match="name another file"):
            nb.evaluate_classifier(*changed, path)
