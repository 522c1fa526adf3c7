"""The sound of a clip: in time with its frames, into videos and noise files."""

import hashlib
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from support.clips import counted
from support.errors import refused
from tav_core.events import Note
from tav_core.noise import InvertedNoise, read_noise, save_noise
from tav_core.presets import PRESETS
from tav_core.sound import Sound
from tav_core.video import load_video, save_video

FRAMES, FPS = 60, 30
PICTURES = torch.from_numpy(np.stack([counted(number) for number in range(FRAMES)]))


def beeps(rate: int, channels: int = 1, seconds: float = FRAMES / FPS) -> Sound:
    """A beep of 20 ms each tenth of a second, each higher than the one before, on the left louder than on the right."""
    time = torch.arange(round(seconds * rate)) / rate
    tone = 0.5 * torch.sin(2 * math.pi * (400 + 50 * (time * 10).floor()) * time) * ((time * 10) % 1 < 0.2)
    return Sound(torch.stack([tone / (channel + 1) for channel in range(channels)]), rate)


def late_by(found: torch.Tensor, right: torch.Tensor, rate: int) -> float:
    """Seconds by which samples `c n` come after those that they should be."""
    size = 2 * right.shape[1]
    spectra = [np.fft.rfft(samples[0].numpy(), size) for samples in (found, right)]
    shift = int(np.fft.irfft(spectra[0] * spectra[1].conj(), size).argmax())
    return (shift if shift < size // 2 else shift - size) / rate


@pytest.mark.parametrize("name, rate, channels", [
    ("a.mp4", 48000, 2), ("a.mp4", 44100, 1), ("a.mp4", 8000, 1), ("a.webm", 48000, 1), ("a.webm", 44100, 2),
])  # fmt: skip
def test_sound_is_written_and_read_in_time(tmp_path, name, rate, channels):
    sound, files = beeps(rate, channels), set()
    for _ in range(2):
        save_video(PICTURES, tmp_path / name, FPS, sound)
        files.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(files) == 1
    clip = load_video(tmp_path / name)
    assert len(clip.frames) == FRAMES and clip.fps == FPS
    assert clip.sound.samples.shape == (channels, clip.sound.rate * FRAMES // FPS)
    assert clip.sound.rate == (48000 if name == "a.webm" else rate)
    if clip.sound.rate == rate:
        assert abs(late_by(clip.sound.samples, sound.samples, rate)) < 0.001
        assert (clip.sound.samples - sound.samples).abs().mean() < 0.005 < 0.02 < sound.samples.abs().mean()
    part = load_video(tmp_path / name, start=15, stride=3, count=7).sound  # from 0.5 s, for 21 frames
    assert torch.equal(part.samples, clip.sound.samples[:, part.rate // 2 : part.rate // 2 + part.rate * 21 // FPS])
    assert load_video(tmp_path / name, sound=False).sound is None


def write(path: Path, sound: Sound, begin: float, codec: str, pictures_begin: float = 0.0, count: int = FRAMES) -> Path:
    """A file whose sound begins at its own time."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"preset": "ultrafast", "x264-params": "keyint=10"})
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        audio = container.add_stream(codec, rate=sound.rate, layout="mono")
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(counted(number % 256), format="rgb24")
            frame.pts, frame.time_base = number + round(pictures_begin * FPS), Fraction(1, FPS)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(sound.samples.numpy(), "fltp", "mono")
        frame.sample_rate, frame.pts = sound.rate, round(begin * sound.rate)
        frame.time_base = Fraction(1, sound.rate)
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    return path


@pytest.mark.parametrize("name, codec", [("a.mkv", "pcm_s16le"), ("a.mkv", "libopus"), ("a.ts", "aac"),
                                         ("a.mov", "pcm_s16le"), ("a.mp4", "aac")])  # fmt: skip
@pytest.mark.parametrize("begin, pictures_begin", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.4)])
def test_sound_that_begins_at_another_time_than_the_pictures(tmp_path, name, codec, begin, pictures_begin):
    sound = beeps(48000, seconds=1.2)
    path = write(tmp_path / name, sound, begin, codec, pictures_begin)
    right = torch.zeros(1, 96000)  # what is heard from the first picture on
    offset = round((begin - pictures_begin) * 48000)
    heard = sound.samples[:, max(0, -offset) :]
    right[:, max(0, offset) :][:, : heard.shape[1]] = heard
    found = load_video(path).sound
    assert abs(late_by(found.samples, right, 48000)) < 0.002
    if begin == 0:  # else some files round it
        assert (found.samples - right).abs().mean() < 0.01 < 0.02 < right.abs().mean()
    late = load_video(path, start=21, count=30).sound
    assert abs(late_by(late.samples, right[:, 33600:81600], 48000)) < 0.002


def test_sound_far_into_a_clip_is_sought(tmp_path):
    path = write(tmp_path / "a.mp4", beeps(16000, seconds=20), 0, "aac", count=600)
    whole, events = load_video(path).sound, []
    part = load_video(path, start=540, count=30, callback=events.append).sound
    right = whole.samples[:, 18 * 16000 : 19 * 16000]
    assert late_by(part.samples, right, 16000) == 0
    assert (part.samples - right).abs().mean() < 0.02 < right.abs().mean()  # AAC fills up with noise of its own
    assert len(events) < 601 + 40 + 60  # packets of video, frames of both


def test_sound_that_cannot_be_decoded_is_left_out_and_told(tmp_path, monkeypatch):
    save_video(PICTURES, tmp_path / "a.mp4", FPS, beeps(16000))

    def changed(*args):
        raise ValueError("another layout")

    monkeypatch.setattr(av, "AudioResampler", changed)
    told = []
    clip = load_video(tmp_path / "a.mp4", callback=told.append)
    assert clip.sound is None and len(clip.frames) == FRAMES
    assert [note.text for note in told if isinstance(note, Note)] == [
        f"the sound of {tmp_path / 'a.mp4'} can't be decoded and is left out"
    ]


def test_more_channels_become_two(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
        audio = container.add_stream("ac3", rate=48000, layout="5.1")
        container.mux(video.encode(av.VideoFrame.from_ndarray(counted(1), format="rgb24")))
        container.mux(video.encode())
        frame = av.AudioFrame.from_ndarray(np.full((6, 4800), 0.2, np.float32), "fltp", "5.1")
        frame.sample_rate = 48000
        container.mux(audio.encode(frame))
        container.mux(audio.encode())
    assert load_video(tmp_path / "a.mkv").sound.samples.shape == (2, 1600)


# --------------------------------------------------------------------------------------------- rate and noise


def test_noise_keeps_the_rate_and_the_sound(tmp_path):
    path, preset, noise = tmp_path / "n.safetensors", PRESETS["mini"], torch.zeros(1, 4, 2, 4, 4)
    save_noise(path, InvertedNoise(noise, "a ball"), preset)  # as earlier versions did
    read = read_noise(path, preset)
    assert (read.fps, read.sound, read.frames) == (None, None, None)
    fps, sound = 30000 / 1001, beeps(44100, 2, seconds=0.2)
    frames = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
    save_noise(path, InvertedNoise(noise, "a ball", None, frames, fps, sound), preset)
    read = read_noise(path, preset)
    assert (read.prompt, read.fps, read.sound.rate) == ("a ball", fps, 44100) and torch.equal(read.frames, frames)
    assert (read.sound.samples - sound.samples).abs().max() < 1e-4


@pytest.mark.parametrize("damage", [{"fps": "nan"}, {"fps": "fast"}, {"fps": "1e9"}, {"sound_rate": "-1"},
                                    {"sound_rate": "x"}])  # fmt: skip
def test_a_damaged_rate_is_told(tmp_path, damage):
    path, preset = tmp_path / "n.safetensors", PRESETS["mini"]
    sound = Sound(torch.zeros(1, 9), 8000)
    save_noise(path, InvertedNoise(torch.zeros(1, 4, 2, 4, 4), "a ball", fps=8.0, sound=sound), preset)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    save_file(tensors, path, metadata | damage)
    refused("is damaged", path, preset, call=read_noise)


@pytest.mark.slow
def test_sound_and_rate_go_through_all_commands(tav, tmp_path):
    sound = beeps(16000, seconds=2)
    y, x = np.mgrid[:64, :64]
    pictures = np.stack([np.stack([(x + 2 * n) % 64 * 4, y * 4, x + y], -1) for n in range(48)]).astype(np.uint8)
    save_video(pictures, tmp_path / "clip.mp4", 24, sound)
    taken = ["--video", tmp_path / "clip.mp4", "--start", 6, "--stride", 3, "--frames", 4, "--size", 64]
    mini, prompt = (
        ["--checkpoint", "mini", "--sampling-steps", "1"],
        ["--prompt", "a red ball", "--edit", "a blue ball"],
    )
    right = load_video(tmp_path / "clip.mp4", start=6, count=12).sound
    tav("edit", *taken, *prompt, "--output", tmp_path / "edit", "--steps", 1, *mini)
    tuned = ["--tuned", tmp_path / "edit" / "tuned.safetensors", *mini]
    noise = ["--noise", tmp_path / "edit" / "noise.safetensors", *prompt[2:]]
    tav("sample", *tuned, *noise, "--output", tmp_path / "sampled")
    tav("sample", *tuned, *noise, "--fps", 12, "--output", tmp_path / "slower")
    tav("sample", *tuned, *noise, "--no-audio", "--output", tmp_path / "silent")
    for folder, fps, heard in (("edit", 8, True), ("sampled", 8, True), ("slower", 12, False), ("silent", 8, False)):
        videos = list((tmp_path / folder).glob("*.mp4"))
        assert len(videos) == (4 if folder == "edit" else 3)
        for video in videos:
            clip = load_video(video)
            assert clip.fps == fps and len(clip.frames) == 4
            assert (clip.sound is not None) == heard
            if heard:
                assert clip.sound.samples.shape == right.samples.shape == (1, 8000)
                assert abs(late_by(clip.sound.samples, right.samples, 16000)) < 0.001
