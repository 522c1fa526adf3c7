"""Tuned weights: what their files hold, and which files are refused."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from support.checkpoints import write
from support.errors import refused
from support.tuning_runs import equal
from tav_core.checkpoint import load_checkpoint
from tav_core.compact import factored, shapes, whole
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
    before, after = unet.state_dict(), other.state_dict()
    tensors, tuned = load_file(path), trainable_parameters(unet)
    assert tensors.keys() == tuned.keys() and {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - tuned.keys())
    assert all(torch.equal(after[name], before[name].half().float()) for name in tuned)


def test_numbers_beyond_half_precision_stay_in_single(checkpoint, tuned, tmp_path):
    unet, path = tuned
    big, *_, tiny = trainable_parameters(unet)
    with torch.no_grad():
        trainable_parameters(unet)[big][0, 0] = 1e6
        trainable_parameters(unet)[tiny][0] = 1e-9  # as good as nothing, beside numbers of 0.01
    save_tuned(path, unet, prompt="", num_frames=1, width=8, height=8, config={})
    assert {name for name, tensor in load_file(path).items() if tensor.dtype == torch.float32} == {big}
    load_tuned(path, other := inflate(checkpoint.unet, temporal_causal=True))
    assert torch.equal(trainable_parameters(other)[big], trainable_parameters(unet)[big])


def test_files_from_when_they_were_in_single_precision(checkpoint, tuned, tmp_path):
    unet, path = tuned
    with safe_open(path, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name not in ("rank", "before")}
    old = write(tmp_path / "old.safetensors", {n: p.detach() for n, p in trainable_parameters(unet).items()}, metadata)
    other = inflate(checkpoint.unet, temporal_causal=True)
    assert load_tuned(old, other) == read_tuned(path)
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), other.state_dict().values()))


# --------------------------------------------------------------------------------------------------- low rank


def low_rank_weights(before, rank):
    """Weights that differ from others by a matrix of a rank, and a little noise."""
    generator = torch.Generator().manual_seed(1)

    def changed(weight):
        if weight.ndim < 2:
            return weight + 0.1
        up, down = (torch.randn(size, generator=generator) for size in ((len(weight), rank), (rank, weight.shape[1])))
        return weight + 0.01 * up @ down + 1e-5 * torch.randn(weight.shape, generator=generator)

    return {name: changed(weight.detach()) for name, weight in before.items()}


def test_a_low_rank_is_the_best_one():
    before = {name: torch.randn(60, 40, generator=torch.Generator().manual_seed(n)) for n, name in enumerate("ab")}
    weights = low_rank_weights(before, 3)
    for rank in (1, 2, 3, 20):
        parts = factored(weights, before, rank)
        assert parts["a.up"].shape == (60, rank) and parts["a.down"].shape == (rank, 40)
        assert shapes(parts) == {"a": (60, 40), "b": (60, 40)}
        for name, weight in whole(parts, before).items():
            change = weights[name] - before[name]
            best = torch.linalg.svdvals(change)[rank:].norm()
            assert (weight - weights[name]).norm() < 1.01 * best + 1e-3 * change.norm()  # these are in float16
    assert all(torch.equal(part, factored(weights, before, 20)[name]) for name, part in parts.items())
    assert factored(weights, before, 24).keys() == {"a", "b"}  # it would be no smaller
    for damaged in ({"a.up": parts["a.up"]}, {"a.up": parts["a.up"], "a.down": parts["a.down"][1:]},
                    {"a.up": parts["a.up"][0], "a.down": parts["a.down"]}, {**parts, "a": weights["a"]}):  # fmt: skip
        assert shapes(damaged).get("a") != (60, 40) or "a.up" in shapes(damaged)


def test_a_file_of_low_rank(checkpoint, tmp_path):
    unet, path = inflate(checkpoint.unet), tmp_path / "tuned.safetensors"
    start = {name: parameter.clone() for name, parameter in trainable_parameters(unet).items()}
    about = dict(prompt="a ball", num_frames=1, width=8, height=8, config={})
    tuned = low_rank_weights(start, 2)
    with torch.no_grad():
        for name, parameter in trainable_parameters(unet).items():
            parameter.copy_(tuned[name])
    save_tuned(path, unet, **about)
    in_half = path.stat().st_size
    save_tuned(path, unet, **about, rank=2, before=start)
    assert path.stat().st_size < in_half / 2 and read_tuned(path).rank == 2
    load_tuned(path, other := inflate(checkpoint.unet))
    for name, parameter in trainable_parameters(other).items():
        assert (parameter - tuned[name]).abs().max() < 1e-3 < (tuned[name] - start[name]).abs().max(), name
    # it is a change of those weights alone, whatever precision they are in
    load_tuned(path, half := inflate(checkpoint.unet).half())
    assert all((p.float() - tuned[n]).abs().max() < 2e-3 for n, p in trainable_parameters(half).items())
    refused("holds changes of other weights than those of this model", path, other, call=load_tuned)
    save_tuned(tmp_path / "again", unet, **about, rank=2, before=start)
    assert equal(load_file(tmp_path / "again"), load_file(path))
    other = inflate(checkpoint.unet)
    with torch.no_grad():
        other.conv_in.bias += 1
    refused("belongs to the base model", path, other, call=load_tuned)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    up = next(name for name in tensors if name.endswith(".up"))
    for changed, tags in (
        ({n: t for n, t in tensors.items() if n != up}, metadata), (tensors | {up: tensors[up][:, 1:]}, metadata),
        (tensors | {up: tensors[up] * torch.nan}, metadata), (tensors, metadata | {"rank": "0"}),
        (tensors, metadata | {"rank": "true"}),
        (tensors, metadata | {"format": "tune-a-video-1"}),
    ):  # fmt: skip
        changed = {name: tensor.contiguous() for name, tensor in changed.items()}
        refused("bad", write(tmp_path / "bad", changed, tags), inflate(checkpoint.unet), call=load_tuned)
    refused("rank=2 is of what the tuning changed", path, unet, **about, rank=2, call=save_tuned)
    refused("rank=0 is out of range", path, unet, **about, rank=0, before=start, call=save_tuned)


# ------------------------------------------------------------------------------------------------ what is refused


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
