"""Tuned weights: what their files hold, and which files are refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from support.checkpoints import write
from support.errors import refused
from tav_core.checkpoint import load_checkpoint
from tav_core.errors import TavError
from tav_core.inflation import inflate
from tav_core.trainable import trainable_parameters
from tav_core.tuned_weights import base_fingerprint, load_tuned, read_tuned, save_tuned


@pytest.fixture
def tuned(checkpoint, tmp_path):
    """A video U-Net with changed weights, and the file that it was saved to."""
    unet = inflate(checkpoint.unet, temporal_causal=True)
    with torch.no_grad():
        for parameter in trainable_parameters(unet).values():
            parameter += 0.01
    path = tmp_path / "tuned.safetensors"
    save_tuned(
        path,
        unet,
        prompt='a "red" star\n',
        num_frames=4,
        width=64,
        height=48,
        config={"steps": 3, "lr": 1e-5},
        base_name="tiny",
    )
    return unet, path


def test_tuned_weights_come_back(checkpoint, tuned):
    unet, path = tuned
    other = inflate(checkpoint.unet, temporal_causal=True)
    info = load_tuned(path, other)
    assert info == read_tuned(path)
    assert (info.prompt, info.num_frames, info.width, info.height) == ('a "red" star\n', 4, 64, 48)
    assert info.config == {"steps": 3, "lr": 1e-5} and info.inflation == unet.inflation and info.base_name == "tiny"
    assert info.versions["torch"] == torch.__version__
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), other.state_dict().values()))
    assert load_file(path).keys() == trainable_parameters(unet).keys()


def test_the_fingerprint_is_of_the_base_model(checkpoint, tuned, copied):
    base = base_fingerprint(checkpoint.unet)
    assert base_fingerprint(tuned[0]) == base_fingerprint(inflate(checkpoint.unet)) == base
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    write(weights, {name: value.half() for name, value in load_file(weights).items()}, {"format": "pt"})
    single, half = (load_checkpoint(copied, dtype=dtype).unet for dtype in (torch.float32, torch.float16))
    assert base_fingerprint(single) == base_fingerprint(half) == base
    with torch.no_grad():
        single.conv_out.bias[1] += 1e-3
    assert base_fingerprint(single) != base_fingerprint(half)


def test_tuned_weights_of_another_model(checkpoint, tuned):
    _, path = tuned
    refused("inflate", path, checkpoint.unet, call=load_tuned)
    refused("inflate", path, inflate(checkpoint.unet), call=load_tuned)
    other = inflate(checkpoint.unet, temporal_causal=True)
    with torch.no_grad():
        other.conv_in.bias += 1
    refused("tiny", path, other, call=load_tuned)


def test_damaged_tuned_weights(checkpoint, tuned, tmp_path):
    _, path = tuned
    unet = inflate(checkpoint.unet, temporal_causal=True)
    tensors, content = load_file(path), path.read_bytes()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    first = next(iter(tensors))
    bad = tmp_path / "bad.safetensors"
    for changed, tags in (
        ({n: t for n, t in tensors.items() if n != first}, metadata),
        (tensors | {"more": torch.zeros(1)}, metadata),
        (tensors, None),
        (tensors, metadata | {"format": "another"}),
    ):
        refused("bad.safetensors", write(bad, changed, tags), unet, call=load_tuned)
    for damaged in (content[:-10], b"", b"plain text"):
        bad.write_bytes(damaged)
        refused("bad.safetensors", bad, unet, call=load_tuned)
    torch.save(tensors, bad)  # a pickle
    refused("bad.safetensors", bad, unet, call=load_tuned)
    refused("path='.*none.safetensors' does not exist", tmp_path / "none.safetensors", unet, call=load_tuned)
    assert not any(torch.equal(p, tensors[n]) for n, p in trainable_parameters(unet).items())  # nothing was loaded


@pytest.mark.parametrize("place", [0, -1])
def test_the_fingerprint_sees_both_ends(checkpoint, place):
    unet = inflate(checkpoint.unet)
    before = base_fingerprint(unet)
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight.view(-1)[place] += 1
    assert base_fingerprint(unet) != before


def test_damaged_metadata_and_shapes(checkpoint, tuned, tmp_path):
    _, path = tuned
    unet = inflate(checkpoint.unet, temporal_causal=True)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    last = list(tensors)[-1]
    bad = tmp_path / "bad.safetensors"
    for changed, tags in (
        (tensors | {last: torch.zeros(2)}, metadata),
        (tensors, {n: v for n, v in metadata.items() if n != "prompt"}),
        (tensors, metadata | {"config": "{"}),
    ):
        refused("bad.safetensors", write(bad, changed, tags), unet, call=load_tuned)


def test_only_a_video_unet_is_saved(checkpoint, tmp_path):
    with pytest.raises(TavError, match="inflate"):
        save_tuned(tmp_path / "a.safetensors", checkpoint.unet, prompt="", num_frames=1, width=8, height=8, config={})


def test_a_path_that_cannot_be_written_leaves_nothing(tuned, tmp_path):
    (tmp_path / "taken").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(TavError, match="path='.*taken' can't be written"):
        save_tuned(tmp_path / "taken", tuned[0], prompt="", num_frames=1, width=8, height=8, config={})
    assert sorted(tmp_path.iterdir()) == before
