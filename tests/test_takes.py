"""Several takes, each with its sentence, in one tuning: the core, the command line and the nodes."""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from support.checkpoints import write
from support.errors import refused
from support.tuning_runs import CONFIG, clip, equal, make_unet, run, steps, stop_at, weights
from support.tuning_runs import take as take_of
from tav_core import TuneConfig, encode_prompt, inflate, load_video, read_tuned, save_video, tune
from tav_core.errors import Cancelled
from tav_core.mini.demo import CLIP
from tav_core.objective import draw_take
from tav_core.take import Take


def take(seed, frames=3, height=4, tokens=5, channels=4, std=0.1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, channels, frames, height, 4, generator=generator)
    std = None if std is None else torch.full_like(latents, std)
    return take_of(latents, torch.randn(1, tokens, 24, generator=generator), std)


OTHERS = [take(1), take(2, frames=5, height=8, tokens=7, std=None)]  # of another length, size and number of tokens


def test_takes_have_their_turn_in_random_order():
    order = [draw_take(0, step, 3) for step in range(60)]
    assert all(sorted(order[i : i + 3]) == [0, 1, 2] for i in range(0, 60, 3))
    assert len({tuple(order[i : i + 3]) for i in range(0, 60, 3)}) > 3
    assert order != [draw_take(1, step, 3) for step in range(60)] and draw_take(0, 41, 3) == order[41]
    assert {draw_take(seed, step, 1) for seed in range(3) for step in range(9)} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, context_length=3, timestep_sampling="stratified")])
def test_tuning_on_takes_is_resumed_to_the_same_weights(tmp_path, config):
    whole, path, seen = make_unet(), tmp_path / "run.safetensors", []
    result = run(whole, config, more_takes=OTHERS)
    with pytest.raises(Cancelled):
        run(make_unet(), config, more_takes=OTHERS, state_path=path, callback=stop_at(3))
    resumed = run(parts := make_unet(), config, more_takes=OTHERS, state_path=path, callback=seen.append)
    assert steps(seen) == [4, 5, 6] and equal(weights(whole), weights(parts))
    assert (resumed.losses, resumed.probe_losses) == (result.losses, result.probe_losses)
    for others in ([], OTHERS[:1], [OTHERS[1], OTHERS[0]]):
        refused("another run .latents, ", make_unet(), config, more_takes=others, state_path=path, call=run)


def test_each_step_sees_one_take_with_its_own_sentence(monkeypatch):
    import tav_core.tuning

    calls, inner = [], tav_core.tuning.tuning_loss
    monkeypatch.setattr(tav_core.tuning, "tuning_loss", lambda *args: (calls.append(args), inner(*args))[1])
    first = take_of(**clip())
    result = run(make_unet(), replace(CONFIG, steps=6, probe_every=6), more_takes=OTHERS)
    probes, learned = calls[:6], calls[6:12]
    assert len(calls) == 6 + 6 + 6
    assert [args[2].shape for args in probes[::2]] == [t.latents.shape for t in (first, *OTHERS)]
    drawn = [draw_take(CONFIG.seed, step, 3) for step in range(6)]
    for args, number in zip(learned, drawn):
        seen = (first, *OTHERS)[number]
        assert args[2].shape == seen.latents.shape and torch.equal(
            args[5].encoder_hidden_states, seen.condition.encoder_hidden_states
        )
        assert torch.equal(args[2], seen.latents) == (seen.latents_std is None)
    assert result.probe_losses[0][1] == pytest.approx(sum(inner(*args).item() for args in probes) / 6, abs=0.05)


@pytest.mark.slow
def test_all_takes_are_learned():
    def losses(unet):
        nothing = replace(CONFIG, steps=1, learning_rate=1e-7, probe_size=8, memory="fast")
        return [
            run(
                unet,
                nothing,
                latents=t.latents,
                encoder_hidden_states=t.condition.encoder_hidden_states,
                latents_std=None,
            ).probe_losses[0][1]
            for t in (take_of(**clip()), *OTHERS)
        ]

    before = losses(unet := make_unet())
    run(unet, replace(CONFIG, steps=90, learning_rate=2e-2, memory="fast"), more_takes=OTHERS)
    assert all(after < 0.95 * start for after, start in zip(losses(unet), before))


def test_the_embedding_alone_is_a_condition():
    text = torch.zeros(1, 5, 24)
    assert Take(torch.zeros(1, 4, 3, 4, 4), text).condition.encoder_hidden_states is text


def test_takes_that_do_not_fit():
    unet = make_unet()
    for other, told in (
        (take(1, channels=8), "latents have 8 channels in take 2, 4 in the first; encode all takes with one VAE"),
        (take_of(torch.zeros(3, 4, 4), torch.zeros(1, 5, 24)), "latents must be b c f h w"),
        (replace(take(1), latents_std=torch.ones(1)), "latents_std has shape"),
    ):
        refused(told, unet, more_takes=[other], call=run)
    refused(
        "context_length=4 is more than the 3 frames",
        unet,
        replace(CONFIG, context_length=4),
        call=run,
        latents=take(1, frames=6).latents,
        latents_std=None,
        more_takes=[take(2)],
    )


# --------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
def test_commands_with_several_takes(tav, tmp_path):
    other, out = tmp_path / "flipped.mp4", tmp_path / "out"
    save_video(load_video(CLIP).frames.flip(2), other, 8)
    fast = ["--steps", 2, "--sampling-steps", 2]
    mini = ["--checkpoint", "mini"]
    tune = [
        "tune",
        *mini,
        "--video",
        CLIP,
        "--prompt",
        "a red ball",
        "--video",
        other,
        "--frames",
        4,
        "--size",
        64,
        "--output",
        out,
        *fast,
    ]
    assert "--video has 2 values, --prompt 1; give each --video its own --prompt" in tav(*tune, fails=True)
    assert not out.exists()
    tav(*tune, "--prompt", "a red ball rolls back")
    info = read_tuned(out / "tuned.safetensors")
    assert (info.prompt, info.more_prompts, info.num_frames) == ("a red ball", ["a red ball rolls back"], 4)

    invert = [
        "invert",
        *mini,
        "--tuned",
        out / "tuned.safetensors",
        "--video",
        other,
        "--output",
        tmp_path / "noise.safetensors",
        *fast[2:],
    ]
    told = tav(*invert, fails=True)
    assert "several clips ('a red ball', 'a red ball rolls back'); say with --prompt what --video shows" in told
    tav(*invert, "--prompt", "a red ball rolls back")
    with safe_open(tmp_path / "noise.safetensors", "pt") as file:
        assert file.metadata()["prompt"] == "a red ball rolls back"


def test_files_from_before_there_were_takes(tav, tmp_path):
    tav(
        "tune",
        "--checkpoint",
        "mini",
        "--video",
        CLIP,
        "--prompt",
        "a red ball",
        "--frames",
        2,
        "--size",
        32,
        "--steps",
        1,
        "--output",
        tmp_path,
    )
    path = tmp_path / "tuned.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("more_prompts") == "[]"
    old = write(tmp_path / "old.safetensors", load_file(path), metadata)
    assert read_tuned(old) == read_tuned(path)


# ------------------------------------------------------------------------------------------------------ nodes


def test_one_shot_tune_learns_takes_as_the_core_does(pack, mini, inference_mode, tmp_path, monkeypatch):
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    nodes, said = pack.nodes, ["a red ball is sliding on the grass", "a red ball slides back", "a still red ball"]
    clips = [
        mini.latent,
        {"samples": mini.vae.encode(mini.images.flip(2))},
        {"samples": mini.vae.encode(mini.images[:2, :64])},
    ]
    takes = ()
    for latent, words in zip(clips[1:], said[1:]):
        takes = nodes.Take.execute(latent, mini.encode(words), takes).args[0]

    def tuned(takes):
        return nodes.OneShotTune.execute(
            mini.inflated, mini.latent, mini.encode(said[0]), 3, 1e-3, 0, "fp32", "fast", "uniform", 0, takes=takes
        ).args[1]

    learned = tuned(takes)
    assert learned.info.num_frames == 4
    with torch.inference_mode(False):
        latents = [mini.model.model.process_latent_in(c["samples"]).movedim(0, 1)[None].clone() for c in clips]
        learned_from = [take_of(x, encode_prompt(mini.checkpoint, words).clone()) for x, words in zip(latents, said)]
        config = TuneConfig(steps=3, learning_rate=1e-3, memory="fast")
        wanted = tune(inflate(mini.checkpoint.unet), mini.checkpoint.scheduler, learned_from, config)
    assert max((learned.tensors[name] - weight).abs().max() for name, weight in wanted.weights.items()) < 1e-4
    assert not all(torch.equal(learned.tensors[name], weight) for name, weight in tuned(takes[:1]).tensors.items())
    with pytest.raises(ValueError, match="positive of take 2 holds 2 prompts"):
        tuned(((clips[1], mini.encode("a") + mini.encode("b")),))
