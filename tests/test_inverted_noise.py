"""Inverted noise in files: the graph's are the command line's, and each samples from the other's."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler

from support.errors import refused
from tav_core import ddim_invert, encode_prompt, inflate
from tav_core.given import check_noise
from tav_core.noise import InvertedNoise, read_noise, save_noise
from tav_core.presets import PRESETS
from tav_core.sound import Sound
from tav_core.trainable import trainable_parameters
from tav_core.tuned_weights import halved, weights_fingerprint

pytestmark = pytest.mark.usefixtures("inference_mode")
SAID, STEPS = "a red ball is sliding on the grass", 5
PRESET = replace(PRESETS["mini"], sampling_steps=STEPS)


@pytest.fixture
def nodes(pack, monkeypatch, tmp_path):
    """With ComfyUI's folders in `tmp_path`."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(f"folder_paths.get_{name}_directory", lambda name=name: str(tmp_path / name))
    return pack.nodes


@pytest.fixture
def text(pack):
    return pack.nodes.LoadCheckpoint.execute("mini").args[1]


def inverted(nodes, mini, words=SAID, scheduler="ddim_uniform"):
    return nodes.DDIMInversion.execute(mini.inflated, mini.latent, mini.encode(words), STEPS, scheduler, False).args[:2]


def edited(nodes, mini, noise, sigmas):
    said = (mini.encode("a blue star is sliding on the snow"), mini.encode(""))
    return nodes.VideoSampler.execute(mini.inflated, *said, noise, 1, 5.0, "ddim_uniform", 0.0, False, 0, sigmas).args[
        0
    ]


def by_the_core(mini, words):
    scheduler = DDIMScheduler.from_config(mini.checkpoint.scheduler.config, set_alpha_to_one=True)
    said = encode_prompt(mini.checkpoint, words)
    return ddim_invert(inflate(mini.checkpoint.unet), mini.latents, said, scheduler, STEPS)


@pytest.mark.parametrize("words, scheduler", [(SAID, "ddim_uniform"), ("", "karras"), ("a zebra", "normal")])
def test_what_is_saved_comes_back(nodes, mini, text, words, scheduler):
    noise, sigmas = inverted(nodes, mini, words, scheduler)
    subject, audio = torch.rand(1, 128, 128), {"waveform": torch.rand(1, 2, 8000) - 0.5, "sample_rate": 16000}
    given = dict(subject=subject, images=mini.images, fps=4.0, audio=audio)
    nodes.SaveInvertedNoise.execute(mini.inflated, text, noise, sigmas, SAID, "skiing/first", **given)
    assert list(nodes.inverted_noise.choices()) == [file := "noise/skiing/first.safetensors [output]"]
    assert nodes.LoadInvertedNoise.validate_inputs(file) is True
    again, levels, condition, said, mask, images, fps, heard = nodes.LoadInvertedNoise.execute(file, mini.inflated).args
    assert (again["samples"] - noise["samples"]).abs().max() < 1e-4 and torch.equal(levels, sigmas)
    assert torch.equal(condition[0][0], mini.encode(words)[0][0]) and said == SAID and fps == 4.0
    assert torch.equal(mask, subject.expand(4, -1, -1)) and torch.equal(images, mini.images)
    assert (heard["waveform"] - audio["waveform"]).abs().max() < 1e-4 and heard["sample_rate"] == 16000
    # a noise mask needs to know what it was inverted with
    again["noise_mask"] = noise["noise_mask"] = torch.ones(1, 128, 128)
    one, other = edited(nodes, mini, noise, sigmas), edited(nodes, mini, again, levels)
    assert (one["samples"] - other["samples"]).abs().max() < 1e-3 < one["samples"].std()


@pytest.mark.parametrize("words", [SAID, ""])
def test_the_command_line_reads_what_a_graph_saved(nodes, mini, text, tmp_path, words):
    noise, sigmas = inverted(nodes, mini, words)
    nodes.SaveInvertedNoise.execute(mini.inflated, text, noise, sigmas, SAID, "a")
    path, preset = (
        tmp_path / "output" / "noise" / "a.safetensors",
        replace(PRESET, caption_as_negative=0.25 * (words > "")),
    )
    read = read_noise(path, preset)
    assert (read.latents - by_the_core(mini, words)).abs().max() < 1e-3 and read.prompt == SAID
    weights = weights_fingerprint(halved(trainable_parameters(inflate(mini.checkpoint.unet))))
    check_noise(path, read, mini.checkpoint, weights)
    refused("was inverted with other weights", path, read, mini.checkpoint, "x", call=check_noise)
    other = replace(preset, caption_as_negative=0.25 - preset.caption_as_negative)
    refused("which was inverted with the", path, other, call=read_noise)


def test_the_command_line_refuses_what_it_would_sample_otherwise(nodes, mini, text, tmp_path):
    path = tmp_path / "output" / "noise" / "a.safetensors"
    nodes.SaveInvertedNoise.execute(mini.inflated, text, *inverted(nodes, mini, SAID, "karras"), SAID, "a")
    read = read_noise(path, PRESET)
    refused("on other noise levels than DDIM takes", path, read, mini.checkpoint, read.weights, call=check_noise)
    nodes.SaveInvertedNoise.execute(mini.inflated, text, *inverted(nodes, mini, "a zebra"), SAID, "a")
    assert read_noise(path).prompt == SAID
    refused("with other words than the clip's sentence", path, PRESET, call=read_noise)


def test_a_graph_reads_what_the_command_line_wrote(nodes, mini, text, tmp_path):
    frames = (mini.images * 255).round().to(torch.uint8)
    found = InvertedNoise(by_the_core(mini, SAID), SAID, frames=frames, fps=4.0, sound=Sound(torch.zeros(1, 8), 8000))
    save_noise(tmp_path / "input" / "noise.safetensors", found, PRESET)
    loaded = nodes.LoadInvertedNoise.execute("noise.safetensors", mini.inflated, text).args
    noise, sigmas = inverted(nodes, mini)
    assert (loaded[0]["samples"] - noise["samples"]).abs().max() < 1e-3 * noise["samples"].abs().max()
    assert loaded[1] == pytest.approx(sigmas, rel=1e-4) and loaded[3] == SAID and loaded[4] is None
    assert torch.equal(loaded[2][0][0], mini.encode(SAID)[0][0]) and torch.equal(loaded[5], mini.images)
    without = nodes.LoadInvertedNoise.execute("noise.safetensors", mini.inflated).args
    assert without[2] is None and list(without[0]) == ["samples"]


def test_mistakes(nodes, mini, text):
    noise, sigmas = inverted(nodes, mini)
    good = dict(model=mini.inflated, clip=text, noise=noise, sigmas=sigmas, prompt=SAID, name="a")
    for changes, told in (
        ({"prompt": " "}, "prompt is empty"),
        ({"name": "../a"}, "leads out of noise"), ({"name": "nul"}, "names a device"),
        ({"noise": mini.latent}, "noise doesn't say what the clip was inverted with; connect it to DDIM Inversion"),
        ({"subject": torch.ones(3, 128, 128)}, "subject is 3 of 128 x 128 for 4 frames of 128 x 128"),
        ({"images": mini.images[:2]}, "images are 2 of 128 x 128, latent is of 4"),
        ({"sigmas": sigmas.flip(0)}, "must fall to 0"), ({"fps": 0.0}, "fps 0.0 is out of range"),
        ({"audio": {"waveform": torch.ones(1, 6, 9), "sample_rate": 48000}}, "audio has 6 channels"),
        ({"audio": {"waveform": torch.ones(9), "sample_rate": 48000}}, "audio is no AUDIO"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            nodes.SaveInvertedNoise.execute(**{**good, **changes})
    with pytest.raises(ValueError, match="is neither in ComfyUI's input folder nor in output/noise"):
        nodes.LoadInvertedNoise.execute("../a.safetensors", mini.inflated)
