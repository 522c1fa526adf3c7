"""Schedules, conversions, inversion and sampling on made-up models with known answers."""

import copy
import weakref

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from tav_core.condition import per_frame
from tav_core.ddim import Guidance, ddim_invert, ddim_sample, ddim_step, ddim_timesteps, from_latents, to_x0
from tav_core.errors import Cancelled, TavError

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
DDIM = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False)


class Model:
    """Predicts noise as a smooth function of latents, timestep and text; counts its calls."""

    dtype = torch.float32

    def __init__(self, scheduler=DDIM, prediction_type="epsilon"):
        self.alphas, self.prediction_type, self.batches = scheduler.alphas_cumprod, prediction_type, []

    def __call__(self, x, t, text):
        self.batches.append(len(x))
        text = per_frame("text", text, len(x), x.shape[2]).mean(dim=(1, 2)).reshape(len(x), 1, -1, 1, 1)
        eps = 0.9 * torch.tanh(x + text) + 0.0002 * t
        alpha = self.alphas[t]
        x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        v = alpha.sqrt() * eps - (1 - alpha).sqrt() * x0
        return {"epsilon": eps, "v_prediction": v, "sample": x0}[self.prediction_type]


def latents(b=1):
    return torch.randn(b, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))


TEXT = torch.full((1, 7, 8), 0.1)
NEGATIVE = torch.full((1, 7, 8), -0.2)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 10, 30, 50, 999])
def test_timesteps_are_those_of_diffusers(spacing, steps):
    scheduler = DDIMScheduler(**SD, timestep_spacing=spacing)
    expected = copy.deepcopy(scheduler)
    expected.set_timesteps(steps)
    before = scheduler.timesteps.clone()
    timesteps = ddim_timesteps(scheduler, steps)
    assert torch.equal(timesteps, expected.timesteps)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None


@pytest.mark.parametrize("cls", [DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_give_a_ddim_schedule(cls):
    names = {name: value for name, value in SD.items() if name != "steps_offset" or cls is not DDPMScheduler}
    timesteps = ddim_timesteps(cls(**names, timestep_spacing="leading"), 10)
    assert len(timesteps) == 10 and torch.equal(timesteps, timesteps.sort(descending=True).values)
    assert torch.isfinite(ddim_sample(Model(), latents(), TEXT, cls(**names), 3, guidance_scale=1)).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_conversions(prediction_type):
    x0, eps, alpha = latents(), latents().flip(0, 2), torch.tensor(0.3)
    x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps
    v = alpha.sqrt() * eps - (1 - alpha).sqrt() * x0
    output = {"epsilon": eps, "v_prediction": v, "sample": x0}[prediction_type]
    sigma = ((1 - alpha) / alpha).sqrt()
    assert torch.allclose(to_x0(output, x, sigma, prediction_type), x0, atol=1e-6)
    assert torch.allclose(from_latents(x, sigma), x0 + sigma * eps, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_sampling_is_that_of_diffusers(prediction_type, eta):
    scheduler = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, prediction_type=prediction_type)
    reference, model, x = copy.deepcopy(scheduler), Model(scheduler, prediction_type), latents()
    reference.set_timesteps(10)
    generator = torch.Generator().manual_seed(3)
    for t in reference.timesteps:
        negative, positive = (model(x, t, text) for text in (NEGATIVE, TEXT))
        output = negative + 3.0 * (positive - negative)
        x = reference.step(output, t, x, eta=eta, generator=generator).prev_sample
    generator = torch.Generator().manual_seed(3)
    out = ddim_sample(
        model,
        latents(),
        TEXT,
        scheduler,
        10,
        guidance_scale=3.0,
        negative_hidden_states=NEGATIVE,
        eta=eta,
        generator=generator,
    )
    assert (out - x).abs().max() <= 2e-5


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_a_step_there_and_back(spacing):
    x, eps = latents(), latents().flip(3)
    for low, high in ((0.1, 0.3), (1.0, 3.0)):
        low, high = torch.tensor(low), torch.tensor(high)
        up = ddim_step(x, x - low * eps, low, high)
        down = ddim_step(up, up - high * eps, high, low)
        assert (down - x).abs().max() <= 2e-6


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_inversion_comes_back(prediction_type, spacing):
    scheduler = DDIMScheduler(**SD, set_alpha_to_one=False, prediction_type=prediction_type, timestep_spacing=spacing)
    model, errors = Model(scheduler, prediction_type), []
    for steps in (20, 200):
        noise = ddim_invert(model, latents(), TEXT, scheduler, steps)
        back = ddim_sample(model, noise, TEXT, scheduler, steps, guidance_scale=1.0)
        errors.append((back - latents()).abs().max().item())
    assert errors[1] < 0.3 * errors[0]  # first order in the step size


def test_epsilon_needs_more_than_pure_noise():
    for spacing in ("trailing", "linspace"):
        scheduler = DDIMScheduler(**SD, rescale_betas_zero_snr=True, timestep_spacing=spacing)
        with pytest.raises(TavError, match="prediction_type='epsilon' tells nothing of a picture in pure noise"):
            ddim_timesteps(scheduler, 10)
    ddim_timesteps(DDIMScheduler(**SD, rescale_betas_zero_snr=True), 10)  # never gets there


def test_a_schedule_may_end_in_pure_noise():
    scheduler = DDIMScheduler(
        **SD,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )
    reference, x = copy.deepcopy(scheduler), latents()
    reference.set_timesteps(10)

    def model(x, t, text):
        return 0.9 * torch.tanh(x + text.mean()) + 0.0002 * t

    model.dtype = torch.float32
    assert scheduler.alphas_cumprod[reference.timesteps[0]] < 1e-6
    for t in reference.timesteps:
        x = reference.step(model(x, t, TEXT), t, x).prev_sample
    out = ddim_sample(model, latents(), TEXT, scheduler, 10, guidance_scale=1)
    assert (out - x).abs().max() <= 1e-5
    noise = ddim_invert(model, latents(), TEXT, scheduler, 10)
    assert torch.isfinite(noise).all() and noise.abs().max() < 10


def test_inversion_does_not_depend_on_the_parametrisation():
    runs = []
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = DDIMScheduler(**SD, set_alpha_to_one=False, prediction_type=prediction_type)
        model = Model(scheduler, prediction_type)
        runs.append(ddim_invert(model, latents(), TEXT, scheduler, 10, return_trajectory=True))
    assert runs[0].shape == (11, *latents().shape) and torch.equal(runs[0][0], latents())
    assert (runs[1] - runs[0]).abs().max() <= 2e-5 and (runs[2] - runs[0]).abs().max() <= 2e-4


def test_only_a_trajectory_keeps_every_stage():
    stages = []
    ddim_invert(Model(), latents(), TEXT, DDIM, 5, callback=lambda step: stages.append(weakref.ref(step.latents)))
    assert sum(stage() is not None for stage in stages) <= 1


def test_guidance():
    model = Model()
    ddim_sample(model, latents(2), TEXT, DDIM, 2, guidance_scale=1.0, negative_hidden_states=NEGATIVE)
    ddim_sample(model, latents(2), TEXT, DDIM, 2, guidance_scale=2.0, negative_hidden_states=NEGATIVE)
    assert model.batches == [2, 2, 4, 4]
    same = ddim_sample(model, latents(), TEXT, DDIM, 5, guidance_scale=4.0, negative_hidden_states=TEXT)
    assert torch.allclose(same, ddim_sample(model, latents(), TEXT, DDIM, 5, guidance_scale=1.0), atol=1e-5)
    per_frame = ddim_sample(
        model, latents(), TEXT.expand(3, -1, -1), DDIM, 5, guidance_scale=4.0, negative_hidden_states=NEGATIVE
    )
    assert torch.allclose(
        per_frame,
        ddim_sample(model, latents(), TEXT, DDIM, 5, guidance_scale=4.0, negative_hidden_states=NEGATIVE),
        atol=1e-5,
    )


def test_each_video_has_its_own_guidance_and_fresh_noise():
    """Batches change no rounding of this model beyond the last bits."""
    settings, scales = dict(negative_hidden_states=NEGATIVE, eta=0.6), [4.0, 1.0, 0.5]
    x = torch.cat([latents(), latents().flip(3), latents().flip(4)])

    def sampled(x, scale, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return ddim_sample(Model(), x, TEXT, DDIM, 5, guidance_scale=scale, generator=generators, **settings)

    together = sampled(x, scales, [1, 2, 1])
    for number, (scale, seed) in enumerate(zip(scales, [1, 2, 1])):
        alone = sampled(x[number : number + 1], scale, [seed])
        assert (together[number] - alone[0]).abs().max() < 1e-5
    assert (together - sampled(x, 4.0, [1, 2, 3])).abs().amax((1, 2, 3, 4)).tolist()[1:] > [1e-2, 1e-2]
    model = Model()
    ddim_sample(model, x, TEXT, DDIM, 2, guidance_scale=[1.0, 0.0, 1.0])
    assert model.batches == [3, 3]
    with pytest.raises(TavError, match="needs negative_hidden_states"):
        ddim_sample(Model(), x, TEXT, DDIM, 2, guidance_scale=scales)


def test_guidance_of_some_steps():
    """Steps without guidance are half a batch, and are those of no guidance at all."""
    model, settings = Model(), dict(guidance_scale=4.0, negative_hidden_states=NEGATIVE)
    end = ddim_sample(model, latents(), TEXT, DDIM, 10, guidance_start=0.2, guidance_end=0.7, **settings)
    assert model.batches == [1] * 2 + [2] * 5 + [1] * 3
    none = ddim_sample(Model(), latents(), TEXT, DDIM, 10, guidance_scale=1.0)
    assert torch.equal(ddim_sample(Model(), latents(), TEXT, DDIM, 10, guidance_end=0.0, **settings), none)
    assert not torch.allclose(end, none, atol=1e-2)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(rescale):
    generator, sigma = torch.Generator().manual_seed(1), torch.tensor(2.5)
    z, negative, positive = torch.randn(3, 1, 4, 3, 5, 6, generator=generator)
    expected = rescale_noise_cfg(negative + 6.0 * (positive - negative), positive, rescale)  # of velocities
    clean = [to_x0(v, z, sigma, "v_prediction") for v in (negative, positive)]
    found = Guidance(6.0, rescale)(torch.cat(clean), from_latents(z, sigma), sigma)
    assert torch.allclose(found, to_x0(expected, z, sigma, "v_prediction"), atol=1e-5)


def test_callback_reports_and_stops():
    seen = []
    ddim_invert(Model(), latents(), TEXT, DDIM, 4, callback=seen.append)
    ddim_sample(Model(), latents(), TEXT, DDIM, 4, guidance_scale=1.0, callback=seen.append)
    assert [(done.stage, done.step, done.total) for done in seen] == [
        (stage, step, 4) for stage in ("invert", "sample") for step in (1, 2, 3, 4)
    ]
    assert [done.timestep for done in seen] == [1, 251, 501, 751, 751, 501, 251, 1]
    assert all(done.latents.shape == done.pred_x0.shape == latents().shape for done in seen)

    def stop(step):
        raise Cancelled

    with pytest.raises(Cancelled):
        ddim_sample(Model(), latents(), TEXT, DDIM, 4, guidance_scale=1.0, callback=stop)


def test_the_model_runs_in_its_dtype_and_the_schedule_in_float32():
    class Half(Model):
        dtype = torch.bfloat16

        def __call__(self, x, t, text):
            assert x.dtype == text.dtype == torch.bfloat16
            return super().__call__(x, t, text).bfloat16()

    assert (
        ddim_sample(
            Half(), latents().bfloat16(), TEXT, DDIM, 3, guidance_scale=2.0, negative_hidden_states=NEGATIVE
        ).dtype
        == torch.float32
    )


@pytest.mark.parametrize("call, message", [
    (lambda: ddim_timesteps(DDIM, 0), "num_steps=0"),
    (lambda: ddim_timesteps(DDIM, 1001), "num_steps=1001"),
    (lambda: ddim_timesteps(DDIM, 1000), "runs past"),
    (lambda: ddim_timesteps(DDIM, 10.0), "num_steps=10.0"),
    (lambda: ddim_timesteps(FlowMatchEulerDiscreteScheduler(), 10), "FlowMatch"),
    (lambda: ddim_timesteps(DDPMScheduler(prediction_type="flow"), 10), "prediction_type='flow'"),
    (lambda: ddim_sample(Model(), latents(), TEXT, DDIM, 3), "negative_hidden_states"),
    (lambda: ddim_sample(Model(), latents(), TEXT, DDIM, 3, negative_hidden_states=NEGATIVE[..., :3]),
     r"in its width \(negative_hidden_states 3, condition .*use one text encoder"),
    (lambda: ddim_sample(Model(), latents(), TEXT, DDIM, 3, guidance_scale=1.0, eta=1.5), "eta=1.5"),
    (lambda: ddim_sample(Model(), latents(), TEXT, DDIM, 3, guidance_rescale=1.1), "guidance_rescale=1.1"),
    (lambda: ddim_sample(Model(), latents(), TEXT, DDIM, 3, guidance_start=0.6, guidance_end=0.5),
     "guidance_start=0.6 is behind guidance_end, which is 0.5; give a smaller number"),
])  # fmt: skip
def test_mistakes_are_named(call, message):
    with pytest.raises(TavError, match=message):
        call()
