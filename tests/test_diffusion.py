"""Schedules, noising, embedding, solvers, denoiser and classifier: against diffusers and against exact mathematics."""

import functools
import math
import signal
import types

import diffusers
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding


@pytest.mark.parametrize(("name", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize("T", [10, 500, 1000])
def test_schedules_agree_with_diffusers(nb, name, theirs, T):
    ours = {"linear": nb.linear_schedule, "cosine": nb.cosine_schedule}[name](T)
    if name == "cosine" or T >= 500:  # a Config refuses the others
        assert torch.equal(nb.make_schedule(nb.make_config("smoke", schedule=name, T=T)), ours)
    oracle = diffusers.DDPMScheduler(T, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs).alphas_cumprod
    assert ours.dtype == torch.float64 and ours.shape == (T,)
    assert 0 < ours[-1] < ours[0] < 1 and (ours.diff() < 0).all()
    torch.testing.assert_close(ours, oracle.double(), rtol=2e-4, atol=1e-6)  # theirs is a float32 product


def test_q_sample_has_the_stated_moments(nb):
    alpha_bar, n = nb.linear_schedule(1000), 100_000
    for t in (0, 250, 999):
        eps = torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(t))
        x_t = nb.q_sample(torch.full((n, 1, 1, 1), 0.7), torch.full((n,), t), eps, alpha_bar)
        mean, std = math.sqrt(alpha_bar[t]) * 0.7, math.sqrt(1 - alpha_bar[t])
        assert abs(x_t.mean() - mean) < 5 * std / math.sqrt(n)
        assert abs(x_t.std() / std - 1) < 5 / math.sqrt(2 * n)


def test_timestep_embedding_agrees_with_diffusers(nb):
    t = torch.tensor([0, 1, 17, 500, 999])
    torch.testing.assert_close(nb.timestep_embedding(t, 64), get_timestep_embedding(t, 64, downscale_freq_shift=1))


# ---------------------------------------------------------------------------------------------- solvers


class Wavy:
    """A nonlinear stand-in for a network, smooth and class dependent."""

    def __init__(self, config):
        self.config = config

    def __call__(self, x_t, t, y):
        return 0.9 * torch.sin(x_t + 0.3 * y.view(-1, 1, 1, 1)) + 0.1 * torch.cos(t / 300).view(-1, 1, 1, 1)


def noises(seed, count, shape):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g) for _ in range(count)]


def oracle_scheduler(solver):
    shared = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    if solver == "dpm++":  # thresholding with these two numbers is the clamp to [-1, 1]
        return diffusers.DPMSolverMultistepScheduler(
            **shared, timestep_spacing="trailing", thresholding=True, sample_max_value=1.0, final_sigmas_type="zero"
        )
    return diffusers.DDIMScheduler(**shared, timestep_spacing="trailing", clip_sample=True, set_alpha_to_one=True)


@pytest.mark.parametrize(("solver", "eta"), [("ddpm", 1.0), ("ddim", 0.0), ("ddim", 0.6), ("dpm++", 0.0)])
def test_solvers_agree_with_diffusers(nb, solver, eta):
    config = nb.make_config("smoke", T=1000)
    model, y, steps = Wavy(config), torch.tensor([0, 3, 9]), 20
    scheduler = oracle_scheduler(solver)
    scheduler.set_timesteps(steps)
    assert nb.timesteps(1000, steps, spacing=1).tolist() == scheduler.timesteps.tolist()
    shape = (3, *config.image_shape)
    draws = noises(5, steps + 1, shape)
    x = draws[0]
    for i, t in enumerate(scheduler.timesteps):
        eps_hat = model(x, t.expand(3), y)
        if solver == "dpm++":
            x = scheduler.step(eps_hat, t, x).prev_sample
        else:
            noise = draws[i + 1] if eta else None
            x = scheduler.step(eps_hat, t, x, eta, use_clipped_model_output=True, variance_noise=noise).prev_sample
    g = torch.Generator().manual_seed(5)  # sample draws its noise in the same order
    ours = nb.sample(model, y, steps, solver, eta=eta, generator=g, spacing=1)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)
    assert x.std() > 0.1  # the comparison is not one of constants


def test_the_default_spacing_agrees_with_diffusers_given_the_same_steps(nb):
    config = nb.make_config("smoke", T=1000)
    model, y, scheduler = Wavy(config), torch.tensor([0, 3, 9]), oracle_scheduler("dpm++")
    scheduler.set_timesteps(timesteps=nb.timesteps(1000, 20).tolist())
    (x,) = noises(5, 1, (3, *config.image_shape))
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(3), y), t, x).prev_sample
    ours = nb.sample(model, y, 20, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)
    assert x.std() > 0.1


def test_steps_are_spaced_by_the_square(nb):
    """Song et al. 2021, appendix D.2: tau_i = c i ** 2, here counted from the end and so that T - 1 is the first."""
    assert nb.timesteps(1000, 5).tolist() == [999, 639, 359, 159, 39]
    assert nb.timesteps(100, 20).tolist()[-8:] == [15, 11, 8, 5, 3, 2, 1, 0]
    with pytest.raises(ValueError, match="spacing = 0.5"):
        nb.sample(Wavy(nb.make_config("smoke")), torch.tensor([0]), spacing=0.5)


@pytest.mark.parametrize(("name", "theirs", "T"), [("linear", "linear", 500), ("cosine", "squaredcos_cap_v2", 20)])
def test_ddpm_over_all_steps_agrees_with_the_ancestral_sampler_of_diffusers(nb, name, theirs, T):
    config = nb.make_config("smoke", T=T, schedule=name)
    scheduler = diffusers.DDPMScheduler(T, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs, clip_sample=True)
    scheduler.set_timesteps(T)
    model, y, shape = Wavy(config), torch.tensor([1, 2]), (2, *config.image_shape)
    x, g = (torch.randn(shape, generator=(g := torch.Generator().manual_seed(0))), g)
    for t in scheduler.timesteps:  # draws from g exactly when t > 0
        x = scheduler.step(model(x, t.expand(2), y), t, x, generator=g).prev_sample
    ours = nb.sample(model, y, T, "ddpm", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("spacing", [1, 1.5, 2, 3])
@pytest.mark.parametrize("steps", [1, 7, 20, 500, 999, 1000])
def test_timesteps_start_at_the_noisiest_and_never_repeat(nb, steps, spacing):
    t = nb.timesteps(1000, steps, spacing)
    assert len(t) == steps and t[0] == 999 and t[-1] >= 0 and (t.diff() < 0).all()


def counted(calls: list, config, scale: float):
    """A model whose answer depends on the label, and that notes the (t, y) of the first image it is asked about."""

    def model(x_t, t, y):
        calls.append((int(t[0]), int(y[0])))
        return x_t * (1 + y.view(-1, 1, 1, 1)) / scale

    model.config = config
    return model


def test_guidance_is_two_passes_and_is_skipped_at_one(nb):
    config, calls, asked = nb.make_config("smoke"), [], []
    model, weaker = counted(calls, config, 10), counted(asked, config, 7)
    x_t, t, y = torch.randn(4, 3, 8, 8), torch.full((4,), 5), torch.tensor([0, 1, 2, 3])
    null = torch.full_like(y, config.num_classes)
    wanted = model(x_t, t, null) + 2.5 * (model(x_t, t, y) - model(x_t, t, null))
    calls.clear()
    torch.testing.assert_close(nb.guided_eps(model, x_t, t, y, 2.5), wanted)
    torch.testing.assert_close(nb.guided_eps(model, x_t, t, y, 1), model(x_t, t, y))
    assert calls == [(5, 0), (5, 10), (5, 0)] + [(5, 0)]
    away = weaker(x_t, t, null) + 2.5 * (model(x_t, t, y) - weaker(x_t, t, null))
    calls.clear(), asked.clear()
    torch.testing.assert_close(nb.guided_eps(model, x_t, t, y, 2.5, weaker), away)
    assert calls == [(5, 0)] and asked == [(5, 10)]
    calls.clear(), asked.clear()
    nb.guided_eps(model, x_t, t, y, 0.5, weaker)
    assert calls == [(5, 0), (5, 10)] and asked == []  # nobody is to be led towards the weaker one


@pytest.mark.parametrize("w", [0, 0.5, 1, 1.5, 4])
def test_guidance_exaggerates_only_inside_its_interval(nb, w):
    config, calls = nb.make_config("smoke"), []
    model, y, dice = counted(calls, config, 20), torch.tensor([3, 3]), torch.Generator()
    x_0, trace = nb.sample(model, y, 12, guidance_scale=w, generator=dice.manual_seed(1), return_trajectory=True)
    alpha_bar, null = nb.make_schedule(config), config.num_classes
    sigma = {t: math.sqrt((1 - alpha_bar[t]) / alpha_bar[t]) for t in nb.timesteps(config.T, 12).tolist()}
    inside = [t for t, s in sigma.items() if 0.3 <= s <= 3]
    assert 1 < len(inside) < 12
    guided = sigma if w < 1 else inside if w > 1 else ()  # to ignore the label works everywhere
    assert [t for t, y in calls if y == null] == list(guided)

    def one_of_both(x_t, t, y):  # the same, written as a model of its own
        scale = w if int(t[0]) in guided else 1
        with_y, without = (x_t * (1 + k) / 20 for k in (3, null))
        return without + scale * (with_y - without)

    one_of_both.config = config
    torch.testing.assert_close(nb.sample(one_of_both, y, 12, generator=dice.manual_seed(1)), x_0, rtol=0, atol=1e-4)
    everywhere = nb.sample(
        model, y, 12, guidance_scale=w, generator=dice.manual_seed(1), guidance_interval=(0, math.inf)
    )
    assert torch.equal(everywhere, x_0) == (w <= 1)


def test_a_weaker_network_has_to_be_of_the_same_kind(nb):
    model, other = Wavy(nb.make_config("smoke")), Wavy(nb.make_config("smoke", schedule="cosine"))
    with pytest.raises(ValueError, match="weaker: made with schedule"):
        nb.sample(model, torch.tensor([0]), 2, guidance_scale=2.0, weaker=other)


def test_trajectory_and_reproducibility(nb):
    model, y = Wavy(nb.make_config("smoke")), torch.tensor([0, 1])
    again = [nb.sample(model, y, 6, "ddpm", generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    x_0, trace = nb.sample(model, y, 6, "ddpm", generator=torch.Generator().manual_seed(1), return_trajectory=True)
    assert torch.equal(*again) and torch.equal(x_0, again[0])
    assert [t for t, _, _ in trace] == nb.timesteps(1000, 6).tolist()
    assert torch.equal(trace[-1][2], x_0)  # no noise is added at the last step
    assert all(x_0_hat.abs().max() <= 1 for _, _, x_0_hat in trace)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"solver": "euler"}, "solver"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"spacing": 0.5}, "spacing"),
        ({"eta": 2.0}, "eta"),
        ({"guidance_interval": (3.0, 0.3)}, "guidance_interval"),
    ],
)
def test_sample_refuses_what_cannot_work(nb, wrong, names):
    with pytest.raises(ValueError, match=names):
        nb.sample(Wavy(nb.make_config("smoke")), torch.tensor([0]), **wrong)
    with pytest.raises(ValueError, match="labels"):
        nb.sample(Wavy(nb.make_config("smoke")), torch.tensor([11]))


# ------------------------------------------------------------------------------- the exact Gaussian case


class Gaussian:
    """The ideal eps_hat when class y is N(mean_y, covariance) over all pixels; the null label mixes nothing (K = 1)."""

    def __init__(self, nb, config, means, covariance):
        self.nb, self.config, self.means = nb, config, means.double()
        self.values, self.vectors = torch.linalg.eigh(covariance.double())
        self.alpha_bar = nb.make_schedule(config)

    def __call__(self, x_t, t, y):
        a = self.nb.at_step(t.double(), torch.logit(self.alpha_bar)).sigmoid()[:, None]
        mean = self.means[y.clamp(max=len(self.means) - 1)]
        centred = (x_t.flatten(1).double() - a.sqrt() * mean) @ self.vectors
        # eps_hat = -sqrt(1-a) * score, the score of N(sqrt(a) mean, a C + (1-a) I)
        eps_hat = (1 - a).sqrt() * (centred / (a * self.values + 1 - a)) @ self.vectors.T
        return eps_hat.view(x_t.shape).to(x_t.dtype)


@pytest.fixture
def gaussian(nb):
    config = nb.make_config("smoke", image_shape=(1, 2, 2), num_classes=1, T=1000)
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.08
    covariance = root @ root.T + 0.004 * torch.eye(4)
    return Gaussian(nb, config, torch.tensor([[0.2, -0.1, 0.0, 0.15]]), covariance), covariance


@pytest.mark.parametrize(("solver", "steps"), [("ddpm", 1000), ("ddim", 500), ("dpm++", 250)])
def test_sample_reproduces_mean_and_covariance(nb, gaussian, solver, steps):
    model, covariance = gaussian
    y = torch.zeros(20_000, dtype=torch.int64)
    x = nb.sample(model, y, steps, solver, generator=torch.Generator().manual_seed(0)).flatten(1).double()
    torch.testing.assert_close(x.mean(0), model.means[0], rtol=0, atol=0.006)
    torch.testing.assert_close(torch.cov(x.T), covariance.double(), rtol=0.08, atol=8e-4)


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.37, 1.0])
def test_denoise_is_the_analytic_posterior_mean(nb, gaussian, sigma):
    model, covariance = gaussian
    noisy = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(1)) * 0.1
    c, mean = covariance.double(), model.means[0]
    gain = c @ torch.linalg.inv(c + sigma**2 * torch.eye(4))
    wanted = mean + (noisy.flatten(1).double() - mean) @ gain.T
    ours = nb.denoise(model, noisy, sigma).flatten(1).double()
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)


def test_sampled_denoising_has_the_posterior_mean_and_covariance(nb, gaussian):
    model, covariance = gaussian
    sigma, c = 0.15, covariance.double()
    noisy = torch.tensor([0.3, -0.2, 0.1, 0.0]).view(1, 1, 2, 2).expand(20_000, -1, -1, -1)
    gain = c @ torch.linalg.inv(c + sigma**2 * torch.eye(4))
    mean = model.means[0] + (noisy[0].flatten().double() - model.means[0]) @ gain.T
    x = nb.denoise(model, noisy, sigma, sampled=True, steps=300, generator=torch.Generator().manual_seed(2))
    x = x.flatten(1).double()
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.005)
    torch.testing.assert_close(torch.cov(x.T), c - gain @ c, rtol=0.1, atol=5e-4)


def test_denoise_takes_the_first_step_for_the_least_noise(nb, gaussian):
    noisy = torch.zeros(1, 1, 2, 2)
    torch.testing.assert_close(nb.denoise(gaussian[0], noisy, 1e-9), noisy, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", [0, -1, 1e4])
def test_denoise_refuses_an_impossible_sigma(nb, gaussian, sigma):
    with pytest.raises(ValueError, match="sigma"):
        nb.denoise(gaussian[0], torch.zeros(1, 1, 2, 2), sigma)
    with pytest.raises(ValueError, match="steps = 0 at least 1"):
        nb.denoise(gaussian[0], torch.zeros(1, 1, 2, 2), 0.1, sampled=True, steps=0)


def test_classify_decides_like_bayes(nb, gaussian):
    one, covariance = gaussian
    config = nb.replace(one.config, num_classes=2)
    means = torch.tensor([[0.15, 0.0, 0.0, 0.1], [-0.15, 0.1, 0.0, 0.0]])
    model = Gaussian(nb, config, means, covariance)
    g = torch.Generator().manual_seed(3)
    truth = torch.arange(400) % 2
    x_0 = means[truth] + torch.randn(400, 4, generator=g) @ torch.linalg.cholesky(covariance).T
    precision = torch.linalg.inv(covariance)
    distance = torch.stack([torch.einsum("bi,ij,bj->b", x_0 - m, precision, x_0 - m) for m in means], 1)
    clear = (distance[:, 0] - distance[:, 1]).abs() > 2.0  # beyond the noise of a finite number of draws
    even = nb.even_guide(config, 0.0, 1.0)
    ours = nb.classify(model, x_0.view(-1, 1, 2, 2), rounds=300, error_rate=0, guide=even)
    bayes = distance.argmin(1)
    assert clear.sum() > 200
    assert (ours.labels == bayes)[clear].float().mean() > 0.97
    assert torch.equal(ours.scores.argmax(1), ours.labels) and ours.evaluations == 1200


def classes_of_noise(nb, n: int, spread: float, seed: int):
    """Ten Gaussian classes of 4x4 pixels that overlap, the exact noise function, and n labelled draws."""
    config = nb.make_config("smoke", image_shape=(1, 4, 4))
    means = torch.randn(10, 16, generator=torch.Generator().manual_seed(0)) * 0.1
    model, truth = Gaussian(nb, config, means, torch.eye(16) * spread**2), torch.arange(n) % 10
    x_0 = means[truth] + spread * torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    return model, nb.ImageSet(nb.to_uint8(x_0.view(-1, 1, 4, 4)), truth, tuple("abcdefghij"), "Gaussian classes")


def test_a_fitted_guide_prunes_without_changing_decisions_and_is_calibrated(nb):
    """Beyond the stated error rate the early end changes nothing, and a probability is what it says."""
    model, seen = classes_of_noise(nb, 500, 0.13, seed=1)
    guide = nb.fit_guide(*nb.study_steps(model, seen, 12), seen.labels)
    _, fresh = classes_of_noise(nb, 1000, 0.13, seed=2)
    x_0 = nb.to_unit(fresh.images)
    full = nb.classify(model, x_0, rounds=12, error_rate=0, guide=guide)
    pruned = nb.classify(model, x_0, rounds=12, error_rate=0.02, guide=guide, batch_size=70)
    assert full.evaluations == 240 and pruned.evaluations < 120
    assert (full.labels == pruned.labels).float().mean() > 0.97
    right = [(v.labels == fresh.labels).float().mean().item() for v in (full, pruned)]
    assert 0.6 < right[0] < 0.98 and right[1] > right[0] - 0.015
    for verdict, share in zip((full, pruned), right):
        assert torch.equal(verdict.scores.argmax(1), verdict.labels)
        torch.testing.assert_close(verdict.scores.sum(1), torch.ones(1000))
        assert verdict.scores.amax(1).mean().item() == pytest.approx(share, abs=0.06)
    assert (pruned.spent.diff(dim=1) >= 0).all() and (full.spent == 20 * torch.arange(1, 13)).all()


def race_over(nb, monkeypatch, table, weight, n_0, error_rate):
    """classify() of images whose errors (N, rounds, k) are known."""
    (n, rounds, k), guide = table.shape, dict(t=[0, 99], information=[1, 1], weight=[weight] * 2, n_0=n_0)
    monkeypatch.setattr(nb, "rounds_of", lambda *_: [(r, weight, None) for r in range(rounds)])
    monkeypatch.setattr(nb, "errors_at", lambda model, x_0, r, eps, pairs, *_: table[pairs[:, 0], r, pairs[:, 1]])
    model = types.SimpleNamespace(config=nb.make_config("smoke", num_classes=k))
    return nb.classify(model, torch.zeros(n, 1), rounds, error_rate, guide)


@pytest.mark.parametrize("error_rate", [0.02, 0.2])
def test_with_independent_rounds_no_more_true_classes_are_dropped_than_stated(nb, monkeypatch, error_rate):
    """Each of the nine drops happens where the class, of ten equally frequent ones, is less probable than error_rate / 9."""
    g, n, rounds, m, v = torch.Generator().manual_seed(0), 3000, 100, 0.5, 1.0
    truth, weight = torch.randint(10, (n,), generator=g), 2 * m / v  # so the sums are the exact log-likelihoods
    table = torch.randn(n, rounds, 10, generator=g) * (v / 2) ** 0.5
    table += m * (1 - torch.nn.functional.one_hot(truth, 10).float())[:, None]
    full, pruned = (race_over(nb, monkeypatch, table, weight, 1e9, e) for e in (0.0, error_rate))
    assert (full.labels == truth).all() and full.evaluations == 2000
    wrong = (pruned.labels != truth).float().mean().item()
    assert error_rate / 4 < wrong < error_rate and pruned.evaluations < 500


def test_a_class_is_dropped_after_the_round_that_decides_it(nb, monkeypatch):
    """By hand: with n_0 = 1 a round counts half, so after r rounds the classes have odds 1 : exp(-r / 2) : exp(-r)."""
    table = torch.tensor([0.0, 1.0, 2.0]).expand(1, 9, 3)
    verdict = race_over(nb, monkeypatch, table, 1.0, 1.0, 0.1)  # the limit is a probability of 0.05
    assert verdict.spent[0].tolist() == [6, 12, 18, 22, 26, 30, 30, 30, 30]  # 0.039 after round 3, 0.047 after round 6
    left = torch.tensor([[0.0, -6 / (1 + 6), -6 / (1 + 3)]])  # how far behind, calibrated, when it was dropped
    torch.testing.assert_close(verdict.scores, left.softmax(1))
    kept = race_over(nb, monkeypatch, 1000 * table, 1.0, 1.0, 0.0)  # probabilities too small for any float
    assert kept.spent[0, -1] == 54 and kept.labels.tolist() == [0]


def test_the_guide_of_known_margins(nb):
    """Wrong labels cost m more on average with variance v: information m²/v, weights in proportion to m/v."""
    g, n, m, v = torch.Generator().manual_seed(0), 4000, torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 1.0, 4.0])
    labels = torch.randint(5, (n,), generator=g)
    errors = torch.randn(n, 3, 5, generator=g) * (v / 2).sqrt().view(3, 1)  # a margin is the difference of two
    errors += m.view(3, 1) * (1 - torch.nn.functional.one_hot(labels, 5).float())[:, None]
    guide = nb.fit_guide(errors, torch.tensor([10, 20, 30]), labels)
    assert guide["information"] == pytest.approx([0, 1, 1], abs=0.05)
    assert guide["weight"][1] / guide["weight"][2] == pytest.approx(2, rel=0.05) and guide["weight"][0] < 0.1
    assert guide["weight"][1] == pytest.approx(2, rel=0.15) and guide["n_0"] > 10  # the exact log-likelihood ratio
    assert guide["accuracy"][0] == pytest.approx(0.2, abs=0.03) and guide["images"] == n


def test_rounds_follow_the_information(nb):
    config = nb.make_config("smoke")
    guide = dict(t=[0, 400, 401, 600, 601, 999], information=[0, 0, 1, 1, 0, 0], weight=[0, 0, 2, 4, 0, 0], n_0=5)
    rounds = nb.rounds_of(guide, 50, config, seed=0)
    t = torch.tensor([step for step, *_ in rounds])
    assert 395 <= t.min() < 410 and 590 < t.max() <= 606 and abs(t.float().mean() - 500) < 10
    for step, weight, eps in rounds[:5]:
        assert weight == pytest.approx(2 + (step - 401) / 199 * 2, abs=0.03) and eps.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("count", [1, 2, 20])
def test_the_default_race_is_between_all_classes_however_many(nb, count):
    config = nb.make_config("smoke", image_shape=(1, 4, 4), num_classes=count)
    means = torch.randn(count, 16, generator=torch.Generator().manual_seed(0)) * 0.4
    model, truth = Gaussian(nb, config, means, torch.eye(16) * 0.005), torch.arange(count)
    verdict = nb.classify(model, means.view(-1, 1, 4, 4))
    assert torch.equal(verdict.labels, truth) and torch.equal(verdict.scores.argmax(1), truth)
    assert verdict.evaluations == (0 if count == 1 else 16 * 2 * count)  # without a guide nothing is dropped
    for wrong in (dict(error_rate=-0.1), dict(error_rate=0.5), dict(rounds=0)):
        with pytest.raises(ValueError, match="error_rate = .* rounds = "):
            nb.classify(model, means.view(-1, 1, 4, 4), **wrong)


def test_a_stopped_evaluation_goes_on_and_another_one_starts_anew(nb, tmp_path, monkeypatch):
    model, images = classes_of_noise(nb, 25, 0.05, seed=3)
    path, asked, original = tmp_path / "deep" / "done.safetensors", [], nb.classify

    def counted(model, x_0, **settings):
        asked.append(len(x_0))
        if asked == [10]:
            signal.raise_signal(signal.SIGINT)  # the stop button, during the first part
        return original(model, x_0, **settings)

    monkeypatch.setattr(nb, "classify", counted)
    part, seconds = nb.evaluate_classifier(model, images, path, part=10, rounds=3)
    assert len(part.labels) == 10 and asked == [10] and seconds > 0
    whole, more = nb.evaluate_classifier(model, images, path, part=10, rounds=3)
    assert asked == [10, 10, 5] and more > seconds
    wanted = original(model, nb.to_unit(images.images), rounds=3)
    assert torch.equal(whole.labels, wanted.labels) and torch.equal(whole.spent, wanted.spent)
    torch.testing.assert_close(whole.scores, wanted.scores)
    nb.evaluate_classifier(model, images, path, part=10, rounds=3)
    assert asked == [10, 10, 5]  # nothing is left to do
    (kept,) = path.parent.iterdir()
    nb.evaluate_classifier(model, images, path, part=25, rounds=2)
    assert asked[3:] == [25] and kept.exists()  # other settings, another file
    nb.evaluate_classifier(model, images, path, part=10, rounds=3)
    assert asked[4:] == []  # and the first is still there
    kept.write_bytes(kept.read_bytes()[:200])
    nb.evaluate_classifier(model, images, path, part=25, rounds=3)
    assert asked[4:] == [25]  # half a file is none
    assert len(list(path.parent.iterdir())) == 2


def test_an_evaluation_of_other_code_starts_anew(nb, tmp_path, monkeypatch):
    """Also where only a name differs, or the inside of an inner function, or the network."""
    source, seen = "def f(x):\n    return [v.{}() {} x for v in x]", set()
    for method, sign in (("square", "+"), ("abs", "+"), ("square", "-")):
        exec(source.format(method, sign), found := {})
        seen.add(repr(nb.anatomy(found["f"].__code__)))
    assert len(seen) == 3
    model, images = classes_of_noise(nb, 8, 0.05, seed=3)
    nb.evaluate_classifier(model, images, tmp_path / "done.safetensors", rounds=2)
    nb.evaluate_classifier(model, images, tmp_path / "done.safetensors", rounds=2)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(nb, "DECISIVE", (*nb.DECISIVE[:-1], nb.Muon.step))
    nb.evaluate_classifier(model, images, tmp_path / "done.safetensors", rounds=2)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_evaluation_ends_without_a_progress_bar(nb, tmp_path, monkeypatch):
    model, images = classes_of_noise(nb, 25, 0.05, seed=3)
    monkeypatch.setattr(nb, "tqdm", functools.partial(nb.tqdm, disable=True))  # what TQDM_DISABLE=1 does
    verdict, _ = nb.evaluate_classifier(model, images, tmp_path / "done.safetensors", part=10, rounds=2)
    assert len(verdict.labels) == 25 and torch.equal(
        verdict.labels, nb.classify(model, nb.to_unit(images.images), 2).labels
    )


def test_a_picture_in_tiles_is_the_posterior_mean_everywhere(nb):
    """With independent pixels the exact posterior mean is the same in every tile, so the average must be it, too."""
    config = nb.make_config("smoke", image_shape=(1, 4, 4))
    model, sigma = Gaussian(nb, config, torch.full((1, 16), 0.1), torch.eye(16) * 0.04), 0.3
    noisy = 0.1 + 0.2 * torch.randn(1, 9, 14, generator=torch.Generator().manual_seed(0))
    wanted = 0.1 + (noisy - 0.1) * 0.04 / (0.04 + sigma**2)
    torch.testing.assert_close(nb.denoise_picture(model, noisy, sigma), wanted, atol=2e-3, rtol=0)
    for shape in ((1, 3, 9), (3, 9, 9)):
        with pytest.raises(ValueError, match=r"must be \(1, 4, 4\) or larger"):
            nb.denoise_picture(model, torch.zeros(shape), sigma)


def test_step_of_inverts_at_step(nb):
    alpha_bar, t = nb.linear_schedule(1000), torch.tensor([0, 0.25, 17.5, 400.9, 999], dtype=torch.float64)
    a = nb.at_step(t, torch.logit(alpha_bar)).sigmoid()
    assert [nb.step_of(v, alpha_bar) for v in a.tolist()] == pytest.approx(t.tolist(), abs=1e-6)
    assert nb.step_of(1e-9, alpha_bar) == 999 and nb.step_of(1 - 1e-9, alpha_bar) == 0


def test_wilson_interval_of_a_known_case(nb):
    assert nb.wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)  # a textbook value
