"""Tuning: determinism, resuming, cancelling, failures and the state file."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from support.tuning_runs import CONFIG, SD, clip, equal, make_unet, notes, run, steps, stop_at, weights
from tav_core.atomic import atomic_path
from tav_core.errors import Cancelled, TavError
from tav_core.events import TuningStep
from tav_core.objective import draw_timesteps, tuning_loss
from tav_core.precision import half_precision_cost
from tav_core.trainable import trainable_parameters
from tav_core.tuning import TuneConfig
from tav_core.tuning_state import read_state

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def uninterrupted():
    unet = make_unet()
    return run(unet), weights(unet)


def test_result_and_progress(uninterrupted):
    result, tuned = uninterrupted
    seen, unet = [], make_unet()
    start, frozen = weights(unet), {n: p.clone() for n, p in unet.named_parameters() if not p.requires_grad}
    again = run(unet, callback=seen.append)
    assert again.losses == result.losses and equal(weights(unet), tuned) and equal(again.weights, tuned)
    assert not any(torch.equal(start[name], tuned[name]) for name in start)
    assert all(torch.equal(p, frozen[n]) for n, p in unet.named_parameters() if n in frozen)
    assert [step for step, _ in result.probe_losses] == [0, 2, 4, 6] and result.steps == len(result.losses) == 6
    seen = [event for event in seen if isinstance(event, TuningStep)]
    assert steps(seen) == [1, 2, 3, 4, 5, 6] and [event.loss for event in seen] == result.losses
    assert {(event.stage, event.total, event.started) for event in seen} == {("tune", 6, 0)}
    assert all(parameter.grad is None for parameter in unet.parameters())


def test_tuning_lowers_the_probe_loss():
    losses = [value for _, value in run(make_unet(), replace(CONFIG, steps=60, learning_rate=2e-2)).probe_losses]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt, RuntimeError])
def test_cancelled_and_resumed(uninterrupted, tmp_path, error):
    result, tuned = uninterrupted
    path = tmp_path / "run.safetensors"
    with pytest.raises(error):
        run(make_unet(), state_path=path, callback=stop_at(3, error))
    unet, seen = make_unet(), []
    resumed = run(unet, state_path=path, callback=seen.append)
    assert steps(seen) == [4, 5, 6] and seen[-1].started == resumed.started == 3
    assert equal(weights(unet), tuned)
    assert (resumed.losses, resumed.probe_losses) == (result.losses, result.probe_losses)


def test_the_cancelled_model_goes_on_too(uninterrupted, tmp_path):
    path, unet = tmp_path / "run.safetensors", make_unet()
    with pytest.raises(Cancelled):
        run(unet, state_path=path, callback=stop_at(3))
    run(unet, state_path=path)
    assert equal(weights(unet), uninterrupted[1])


@pytest.mark.parametrize("minutes, kept", [(2.0, [0, 0, 0, 3, 3, 3]), (0.0, [0, 1, 2, 3, 4, 5]), (60.0, [0] * 6)])
def test_the_state_is_written_by_time_too(monkeypatch, tmp_path, minutes, kept):
    path, now, found = tmp_path / "run.safetensors", [0.0], []
    monkeypatch.setattr("tav_core.tuning.time.monotonic", lambda: now[0])

    def callback(event):
        if isinstance(event, TuningStep):
            now[0] += 50
            found.append(read_state(path)[0].step if path.exists() else 0)

    run(make_unet(), replace(CONFIG, save_every=100, save_minutes=minutes), state_path=path, callback=callback)
    assert found == kept and read_state(path)[0].step == 6


@pytest.mark.slow
def test_killed_and_resumed(uninterrupted, tmp_path):
    path = tmp_path / "run.safetensors"
    script = f"""
        import os, signal, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from support.tuning_runs import make_unet, run

        def kill(event):
            if getattr(event, "step", 0) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        run(make_unet(), state_path={str(path)!r}, callback=kill)
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment, timeout=600)
    assert killed.returncode == -signal.SIGKILL
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["step"]) == 4
    unet = make_unet()
    resumed = run(unet, state_path=path)
    assert equal(weights(unet), uninterrupted[1]) and resumed.losses == uninterrupted[0].losses
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_finished_state_returns_at_once_and_can_be_prolonged(uninterrupted, tmp_path):
    path = tmp_path / "run.safetensors"
    run(make_unet(), replace(CONFIG, steps=4, save_every=3, probe_every=1), state_path=path)
    unet, seen = make_unet(), []
    result = run(unet, replace(CONFIG, steps=4), state_path=path, callback=seen.append)
    assert not steps(seen) and result.steps == result.started == 4 and len(result.losses) == 4
    run(unet := make_unet(), state_path=path)
    assert equal(weights(unet), uninterrupted[1])


@pytest.mark.parametrize("change, named", [
    ({"config": replace(CONFIG, seed=6)}, "seed"),
    ({"config": replace(CONFIG, learning_rate=2e-3)}, "learning_rate"),
    ({"latents": clip()["latents"] + 1}, "latents"),
    ({"latents_std": None}, "latents_std"),
    ({"encoder_hidden_states": clip()["encoder_hidden_states"] + 1}, "encoder_hidden_states"),
    ({"scheduler": DDIMScheduler(**SD, prediction_type="v_prediction")}, "prediction_type"),
])  # fmt: skip
def test_state_of_another_run(tmp_path, change, named):
    path, change = tmp_path / "run.safetensors", {"config": CONFIG} | change
    change["config"] = replace(change["config"], steps=1)
    run(make_unet(), replace(CONFIG, steps=1), state_path=path)
    before = path.read_bytes()
    with pytest.raises(TavError, match=rf"another run \({named} changed\)"):
        run(make_unet(), state_path=path, **change)
    assert path.read_bytes() == before
    run(make_unet(), state_path=path, resume=False, **change)
    assert path.read_bytes() != before


def test_state_of_another_model(tmp_path):
    path, unet = tmp_path / "run.safetensors", make_unet()
    run(unet, replace(CONFIG, steps=1), state_path=path)
    next(iter(trainable_parameters(unet).values())).data += 1
    with pytest.raises(TavError, match="initial weights changed"):
        run(unet, state_path=path)


# ------------------------------------------------------------------------------- the average, and kept steps


def test_the_average_is_of_the_weights_of_all_steps(uninterrupted):
    seen, probes, unet = [weights(make_unet())], [], make_unet()

    def callback(event):
        if isinstance(event, TuningStep):
            seen.append(weights(unet))  # what the callback sees is the average
            probes.append(event.probe_loss)

    for decay in (0.9, 0.0):
        seen, probes, unet = seen[:1], [], make_unet()
        result = run(unet, replace(CONFIG, weight_average=decay, memory="fast"), callback=callback)
        if decay:
            averaged, probed, losses = seen, probes, result.losses
            assert equal(result.weights, averaged[-1]) and equal(weights(unet), averaged[-1])
    assert equal(result.weights, uninterrupted[1]) and losses == result.losses  # the run itself is the same
    assert probed[-1] != probes[-1]
    expected = seen[0]
    for step, own in enumerate(seen[1:], 1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {name: decay * weight + (1 - decay) * own[name] for name, weight in expected.items()}
        assert all((averaged[step][name] - weight).abs().max() < 1e-6 for name, weight in expected.items())
    assert any((expected[name] - own[name]).abs().max() > 1e-4 for name in own)


def test_kept_steps_are_those_of_shorter_runs_also_of_a_resumed_one(tmp_path):
    config, path = replace(CONFIG, weight_average=0.9, keep=[4, 2], memory="fast"), tmp_path / "run.safetensors"
    whole = run(make_unet(), config)
    assert list(whole.kept) == [2, 4]
    shorter = run(make_unet(), replace(config, steps=2, keep=()))
    assert equal(whole.kept[2], {name: weight.half() for name, weight in shorter.weights.items()})
    for stop in (2, 3, 5):  # at the very step, before its state is written, and with all of them
        with pytest.raises(Cancelled):
            run(make_unet(), config, state_path=path, callback=stop_at(stop))
    resumed = run(unet := make_unet(), config, state_path=path)
    assert resumed.started == 5 and equal(resumed.weights, whole.weights) and equal(weights(unet), whole.weights)
    assert all(equal(resumed.kept[step], whole.kept[step]) for step in whole.kept)
    again = run(unet, config, state_path=path)  # what holds the weights of the state goes on from it
    assert again.started == 6 and again.kept.keys() == {2, 4}
    with pytest.raises(TavError, match="keep=3 is over: .* is at step 6, and wasn't told to keep it; leave it out"):
        run(make_unet(), replace(config, keep=[3, 4]), state_path=path)
    longer = run(make_unet(), replace(config, steps=8, keep=[2, 8]), state_path=path)
    assert longer.started == 6 and list(longer.kept) == [2, 8]
    assert equal(longer.kept[8], {name: weight.half() for name, weight in longer.weights.items()})


def test_states_that_tell_of_other_averages_and_kept_steps(tmp_path):
    path, config = tmp_path / "run.safetensors", replace(CONFIG, steps=2, weight_average=0.5, keep=[1], memory="fast")
    run(make_unet(), config, state_path=path)
    with pytest.raises(TavError, match=r"another run \(weight_average changed\)"):
        run(make_unet(), replace(config, weight_average=0.0), state_path=path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    average, kept = (next(name for name in tensors if name.startswith(kind)) for kind in ("average.", "kept."))
    for changed in (
        {average: None}, {average: tensors[average].flatten()}, {average: tensors[average] * torch.nan},
        {kept: None}, {kept: tensors[kept].flatten()}, {kept: None, kept.replace("kept.1", "kept.9"): tensors[kept]},
        {kept.replace("kept.1", "kept.x"): tensors[kept]}, {"kept.1": tensors[kept]},
    ):  # fmt: skip
        save_file({n: t.clone() for n, t in (tensors | changed).items() if t is not None}, path, metadata)
        with pytest.raises(TavError, match="run.safetensors' is damaged"):
            run(make_unet(), config, state_path=path)


@pytest.mark.parametrize("content", [b"", b"not a state file at all"])
def test_damaged_state(tmp_path, content):
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(TavError, match="state_path='.*run.safetensors' can't be read"):
        run(make_unet(), state_path=path)


@pytest.mark.parametrize("save_every, kept", [(2, 2), (100, 0)])
def test_not_finite(monkeypatch, tmp_path, save_every, kept):
    path, unet, config = tmp_path / "run.safetensors", make_unet(), replace(CONFIG, save_every=save_every)
    with pytest.raises(Cancelled):
        run(reference := make_unet(), callback=stop_at(2))
    expected = weights(reference if kept else make_unet())

    def spoiled(unet, scheduler, latents, noise, *args):
        broken = torch.nan if len(calls) == 5 else 0  # after two probes (of two draws) and two steps
        return tuning_loss(unet, scheduler, latents, noise + broken, *args)

    calls = []
    monkeypatch.setattr("tav_core.tuning.tuning_loss", lambda *args: (spoiled(*args), calls.append(1))[0])
    config = replace(config, probe_every=50)
    with pytest.raises(TavError, match="learning_rate=0.001 is too much: the loss at step 4 is not finite; lower it"):
        run(unet, config, state_path=path)
    assert equal(weights(unet), expected)
    assert path.exists() == bool(kept)
    if kept:
        with safe_open(path, framework="pt") as file:
            assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())
            assert json.loads(file.metadata()["step"]) == kept


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_full(monkeypatch, tmp_path, function):
    path = tmp_path / "run.safetensors"

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    with pytest.raises(
        TavError, match=r"path='.*' can't be written \(No space left on device\); free space or"
    ) as caught:
        run(make_unet(), state_path=path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_atomic_path(tmp_path):
    path = tmp_path / "new" / "clip.mp4"
    with atomic_path(path) as temporary:
        assert temporary.parent.parent == path.parent and temporary.name == path.name
        temporary.write_text("first")
    with pytest.raises(KeyError), atomic_path(path) as temporary:
        temporary.write_text("second")
        raise KeyError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    with pytest.raises(TavError, match="path='.*below' can't be written"), atomic_path(path / "below"):
        pass


def test_loss_of_each_prediction_type():
    torch.manual_seed(0)
    x0, noise, output = torch.randn(3, 2, 4, 2, 3, 3)
    t, text = torch.tensor([10, 900]), torch.zeros(1, 5, 24)
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        scheduler = DDIMScheduler(**SD, prediction_type=prediction_type)
        noisy = scheduler.add_noise(x0, noise, t)
        target = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x0, noise, t), "sample": x0}[prediction_type]
        asked = []

        def unet(*args, asked=asked):
            asked.append(args)
            return output

        unet.dtype = torch.float32
        loss = tuning_loss(unet, scheduler, x0, noise, t, text)
        assert torch.allclose(loss, (output - target).square().mean(), atol=1e-6)
        assert torch.allclose(asked[0][0], noisy, atol=1e-6)
        alpha = scheduler.alphas_cumprod[t]
        snr = alpha / (1 - alpha)
        divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction_type]
        weight = snr.clamp(max=5) / divisor
        expected = (weight * (output - target).square().mean(dim=(1, 2, 3, 4))).mean()
        assert torch.allclose(tuning_loss(unet, scheduler, x0, noise, t, text, "min_snr"), expected)


def test_v_prediction_tunes():
    scheduler = DDIMScheduler(**SD, prediction_type="v_prediction")
    config = replace(CONFIG, steps=40, probe_every=40, loss_weighting="min_snr", timestep_sampling="stratified")
    losses = [value for _, value in run(make_unet(), config, scheduler).probe_losses]
    assert losses[-1] < losses[0]


def test_timesteps_cover_the_range():
    def draw(sampling, seed=0):
        return torch.cat([draw_timesteps(sampling, seed, step, 1, 1600) for step in range(64)])

    for sampling in ("uniform", "stratified"):
        assert torch.equal(draw(sampling), draw(sampling)) and not torch.equal(draw(sampling), draw(sampling, 1))
        assert draw(sampling).min() >= 0 and draw(sampling).max() < 1600
    for block in draw("stratified").reshape(4, 16):
        assert (block // 100).sort().values.tolist() == list(range(16))


@pytest.mark.parametrize(
    "times, told",
    [
        (1.9, []),
        (40.2, ["dtype: bf16 makes this CPU compute matrix products 40 times as slowly as fp32 does; use fp32"]),
    ],
)
def test_a_dtype_that_the_cpu_has_no_arithmetic_for_is_told(monkeypatch, times, told):
    assert half_precision_cost(torch.bfloat16) > 0
    lines = []
    monkeypatch.setattr("tav_core.tuning.half_precision_cost", lambda dtype: times)
    run(make_unet(), replace(CONFIG, dtype="bf16", steps=1, memory="fast"), callback=lines.append)
    assert notes(lines) == told
    run(make_unet(), replace(CONFIG, steps=1, memory="fast"), callback=lines.append)
    assert notes(lines) == told


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(dtype, uninterrupted, tmp_path):
    unet, path = make_unet(), tmp_path / "run.safetensors"
    config = replace(CONFIG, dtype=dtype, memory="checkpointing")
    before = {name: parameter.clone() for name, parameter in unet.named_parameters() if not parameter.requires_grad}
    result = run(unet, config)
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    assert all(torch.equal(parameter, before[n]) for n, parameter in unet.named_parameters() if n in before)
    assert max(abs(a - b) for a, b in zip(result.losses, uninterrupted[0].losses)) < 0.05
    with pytest.raises(Cancelled):
        run(make_unet(), config, state_path=path, callback=stop_at(3))
    run(resumed := make_unet(), config, state_path=path)
    assert equal(weights(resumed), weights(unet))


def test_a_half_precision_model_comes_back_in_its_dtype():
    unet = make_unet().to(torch.bfloat16)
    result = run(unet, replace(CONFIG, dtype="bf16"))
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in result.weights.values()} == {torch.float32}


@pytest.mark.parametrize("field, value", [
    ("steps", 0), ("steps", 1.5), ("learning_rate", 0.0), ("learning_rate", float("nan")), ("betas", (0.9, 1.0)),
    ("weight_decay", -1.0), ("eps", 0.0), ("max_grad_norm", 0.0), ("warmup_steps", -1), ("seed", -1),
    ("dtype", "int8"), ("memory", "tiny"), ("probe_every", 0), ("probe_size", 0), ("save_every", 0),
    ("timestep_sampling", "cosine"), ("loss_weighting", "snr"), ("weight_average", 1.0), ("keep", [501]),
    ("keep", [0]), ("keep", [1.5]),
])  # fmt: skip
def test_config_mistakes_are_named(field, value):
    with pytest.raises(TavError, match=f"{field}="):
        TuneConfig(**{field: value})


def test_kept_steps_are_few():
    for keep in ([1, 1], range(1, 10)):
        with pytest.raises(TavError, match=f"keep has {len(keep)} steps; give 8 or fewer, each of them once"):
            TuneConfig(keep=keep)


def test_warmup():
    rates = []
    run(
        make_unet(),
        replace(CONFIG, warmup_steps=4),
        callback=lambda event: isinstance(event, TuningStep) and rates.append(event.lr),
    )
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_inputs_that_do_not_fit():
    unet = make_unet()
    for change, message in (
        ({"latents": clip()["latents"][0]}, "latents must be b c f h w"),
        ({"latents_std": torch.ones(1)}, "latents_std"),
        ({"encoder_hidden_states": torch.zeros(2, 5, 24)}, "encoder_hidden_states has a batch of 2"),
    ):
        with pytest.raises(TavError, match=message):
            run(unet, **change)
    with pytest.raises(TavError, match="inflate it first"):
        run(torch.nn.Linear(1, 1))


def test_disk_full_in_safetensors(monkeypatch, tmp_path):
    path = tmp_path / "run.safetensors"

    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("tav_core.tuning_state.save_file", full)
    with pytest.raises(TavError, match=r"run.safetensors' can't be written \(No space left on device\); free space or"):
        run(make_unet(), state_path=path)
