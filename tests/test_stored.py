"""Tuned weights, noise and states of others, or spoiled: refused in one line, and nothing of them is used."""

import os
from dataclasses import replace

import pytest
import torch

from fuzz_cli import DAMAGED, damage
from support.errors import refused
from support.tuning_runs import CONFIG, equal, make_unet, run, weights
from tav_core.given import check_noise
from tav_core.inflation import inflate
from tav_core.noise import InvertedNoise, read_noise, save_noise
from tav_core.presets import PRESETS
from tav_core.trainable import trainable_parameters
from tav_core.tuned_weights import load_tuned, read_tuned, save_tuned

PRESET = replace(PRESETS["mini"], sampling_steps=1)


@pytest.fixture(scope="module")
def files(checkpoint, tmp_path_factory):
    """Whole ones, and one for each way to be damaged."""
    work = tmp_path_factory.mktemp("stored")
    about = dict(prompt="a ball", num_frames=2, width=32, height=32, config={}, base_name="tiny")
    save_tuned(work / "tuned.safetensors", inflate(checkpoint.unet), **about)
    noise = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    frames = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    save_noise(work / "noise.safetensors", InvertedNoise(noise, "a ball", torch.ones(1, 1, 2, 32, 32), frames), PRESET)
    run(make_unet(), replace(CONFIG, steps=1), state_path=work / "whole.safetensors")
    damage(work, work / "whole.safetensors")
    return work


def test_whole_ones_are_read(files, checkpoint):
    assert load_tuned(files / "tuned.safetensors", inflate(checkpoint.unet)) == read_tuned(files / "tuned.safetensors")
    noise = read_noise(files / "noise.safetensors", PRESET)
    assert noise.latents.shape == (1, 4, 2, 4, 4) and noise.subject.shape == (1, 1, 2, 32, 32)
    assert noise.frames.shape == (2, 32, 32, 3) and noise.prompt == "a ball"
    assert run(make_unet(), replace(CONFIG, steps=1), state_path=files / "whole.safetensors").started == 1


@pytest.mark.parametrize("name", DAMAGED["tuned"])
def test_damaged_tuned_weights(files, checkpoint, name):
    unet, path = inflate(checkpoint.unet), files / f"tuned-{name}.safetensors"
    before = {name: parameter.clone() for name, parameter in trainable_parameters(unet).items()}
    refused(f"path='.*tuned-{name}.safetensors'", path, unet, call=load_tuned)
    assert equal(before, weights(unet))


@pytest.mark.parametrize("name", DAMAGED["noise"])
def test_damaged_noise(files, checkpoint, name):
    path = files / f"noise-{name}.safetensors"

    def read():
        check_noise(path, read_noise(path, PRESET), checkpoint, "")

    refused(f"path='.*noise-{name}.safetensors'", call=read)


@pytest.mark.parametrize("name", DAMAGED["state"])
def test_damaged_states(files, name):
    unet, path = make_unet(), files / f"state-{name}" / "tuning-state.safetensors"
    before = weights(unet)
    refused(f"state_path='.*state-{name}/tuning-state.safetensors'", unet, state_path=path, call=run)
    assert equal(before, weights(unet))


@pytest.mark.parametrize("call", [read_tuned, lambda path: read_noise(path, PRESET)])
def test_what_is_no_file(tmp_path, call):
    os.mkfifo(tmp_path / "pipe")  # which a reader would wait for
    refused("pipe' is no file", tmp_path / "pipe", call=call)
    refused("' is no file", tmp_path, call=call)
    refused("none' does not exist", tmp_path / "none", call=call)
