"""LPIPS and RAFT, against what their packages compute when they are called directly; the weights are random ones."""

import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support import ROOT
from support.errors import refused
from tav_core import measure, perceptual
from tav_core.flow import dis_flow
from tav_core.metrics import warp_errors
from tav_core.mini import world
from tav_core.video import save_video


def clip(**changes):
    return torch.from_numpy(world.render_clip(world.clip_scenes(world.Scene(**changes), "slide", 3)))


def state_of(file):
    return load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)


@pytest.fixture(scope="module")
def videos():
    """An edit and its source, 2 56 72 3: no multiples of 16."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (2, 56, 72, 3), dtype=torch.uint8, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def files(perceptual, tmp_path_factory):
    """State dicts as torchvision publishes them; of AlexNet, whose classifier has 200 MB, the part that is read."""
    from torchvision import models

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    alex = {name: tensor for name, tensor in models.AlexNet().state_dict().items() if name.startswith("features.")}
    save_file(alex, folder / "alexnet.safetensors")
    torch.save(models.squeezenet1_1(weights=None).state_dict(), folder / "squeezenet.pth")
    raft = models.optical_flow.raft_large(weights=None).state_dict()
    for name in ("weight", "bias"):  # flow that leads there and back
        raft[f"update_block.flow_head.conv2.{name}"] *= 0.1
    torch.save(raft, folder / "raft.pth")
    return {"alex": folder / "alexnet.safetensors", "squeeze": folder / "squeezenet.pth", "raft": folder / "raft.pth"}


@pytest.fixture(scope="module")
def raft(files):
    return perceptual.load_raft(files["raft"])


@pytest.mark.parametrize("net", ["alex", "squeeze"])
def test_lpips_is_that_of_its_package(files, videos, net):
    import lpips
    from torchvision import models

    (edit, source), mask = videos, torch.zeros(2, 56, 72)
    mask[:, :, 40:] = 1
    ours = perceptual.load_lpips(files[net])
    assert ours.net == net and not ours.model.training

    with pytest.warns(UserWarning, match="deprecated"):  # which ours keeps to itself
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    network = models.AlexNet() if net == "alex" else models.squeezenet1_1(weights=None)
    network.load_state_dict(state_of(files[net]), strict=False)
    for k in range(theirs.net.N_slices):  # parts of the network itself
        for name in getattr(theirs.net, f"slice{k + 1}")._modules:
            getattr(theirs.net, f"slice{k + 1}")._modules[name] = network.features[int(name)]

    def wanted(kept):
        pictures = [x.movedim(-1, 1) / 255 * kept for x in videos]
        with torch.no_grad():
            return theirs(*pictures, normalize=True).mean().item()

    whole = perceptual.lpips_distance(ours, edit, source)
    rest = perceptual.lpips_distance(ours, edit, source, mask)
    assert whole == pytest.approx(wanted(1), rel=1e-4) and rest == pytest.approx(wanted(1 - mask[:, None]), rel=1e-4)
    assert 0 < rest < 0.9 * whole and perceptual.lpips_distance(ours, source, source) == 0
    changed = torch.where(mask[..., None] > 0, edit, source)
    assert (
        perceptual.lpips_distance(ours, changed, source, mask) == 0 < perceptual.lpips_distance(ours, changed, source)
    )


@pytest.mark.parametrize("height, width", [(128, 136), (131, 142)])
def test_raft_is_that_of_torchvision(files, raft, height, width):
    """Of frames that aren't multiples of 8 as well, as torchvision's evaluation pads them."""
    from torchvision.models.optical_flow import raft_large
    from torchvision.transforms._presets import OpticalFlow

    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=generator)
    found = perceptual.raft_flow(raft)(*frames.numpy())
    theirs = raft_large(weights=None).eval()
    theirs.load_state_dict(state_of(files["raft"]))
    down, right = (-height % 8, -width % 8)
    places = [np.clip(np.arange(n + more) - more // 2, 0, n - 1) for n, more in ((height, down), (width, right))]
    padded = frames.movedim(-1, 1)[:, :, places[0]][..., places[1]]
    with torch.no_grad():
        wanted = theirs(*OpticalFlow()(padded[:1], padded[1:]))[-1][0].movedim(0, -1)
    wanted = wanted[down // 2 :, right // 2 :][:height, :width].numpy()
    assert found.shape == (height, width, 2) and np.abs(wanted).max() > 0.1
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_warp_errors_take_any_flow():
    """Along the right flow a moved picture has none, along another one it has."""
    generator = torch.Generator().manual_seed(2)
    wide = torch.nn.functional.interpolate(torch.rand(1, 3, 8, 24, generator=generator), (32, 96), mode="bicubic")
    wide = (wide.clamp(0, 1) * 255).to(torch.uint8)[0].movedim(0, -1)
    source = torch.stack([wide[:, 4 * i : 4 * i + 64] for i in range(3)])  # what is seen moves to the left

    def flow(now, then, by=4):
        sign = 1 if np.array_equal(now[:, 4:], then[:, :-4]) else -1
        return np.stack([np.full(now.shape[:2], -by * sign), np.zeros(now.shape[:2])], -1).astype(np.float32)

    still = source[:1].expand_as(source)
    right = warp_errors([source, still], source, flow)
    wrong = warp_errors([source, still], source, lambda now, then: flow(now, then, 0))
    assert right[0] < 1e-6 < 1e-3 < right[1] and wrong[1] < 1e-6 < 1e-3 < wrong[0]
    assert warp_errors([source], source)[0] == warp_errors([source], source, dis_flow())[0] < 0.1 * wrong[0]


def test_they_stand_in_the_table_beside_the_source(files, raft):
    edit, source = clip(background="sand"), clip()
    mask = torch.zeros(3, 128, 128)
    mask[:, :, 64:] = 1
    models = measure.load_models(lpips=files["squeeze"], raft=files["raft"])
    found = measure.measure("a", edit, source, "a blue ball", mask=mask, models=models)
    plain = measure.measure("a", edit, source, "a blue ball", mask=mask)
    assert set(found.figures) - set(plain.figures) == {"lpips_squeeze_rest", "warp_error_raft"}
    assert set(found.of_source) - set(plain.of_source) == {"warp_error_raft"}
    assert {name: found.figures[name] for name in plain.figures} == plain.figures
    assert found.figures["lpips_squeeze_rest"] == perceptual.lpips_distance(models.lpips, edit, source, mask) > 0
    errors = found.figures["warp_error_raft"], found.of_source["warp_error_raft"]
    assert [*errors] == pytest.approx(warp_errors([edit, source], source, perceptual.raft_flow(raft)), nan_ok=True)
    assert not math.isnan(errors[0]) and errors[0] != errors[1]
    assert all(measure.FIGURES[name].endswith("; lower") for name in ("lpips_squeeze_rest", "warp_error_raft"))


def test_the_command(files, tav, tmp_path):
    save_video(clip(colour="blue"), tmp_path / "edit.mp4", 8)
    save_video(clip(), tmp_path / "source.mp4", 8)
    given = ["--edited", tmp_path / "edit.mp4", "--source", tmp_path / "source.mp4", "--prompt", "a blue ball"]
    given += ["--device", "cpu", "--output", tmp_path / "out"]
    told = tav("metrics", *given, "--lpips", files["alex"], "--raft", files["raft"])
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines()[1:]}
    assert len(rows["lpips_alex_rest"]) == 1 and len(rows["warp_error_raft"]) == 2  # the second the source's own
    (line,) = csv.DictReader((tmp_path / "out" / "metrics.csv").read_text().splitlines())
    assert float(line["lpips_alex_rest"]) == pytest.approx(float(rows["lpips_alex_rest"][0]), rel=1e-3)
    assert line["source_lpips_alex_rest"] == "" and float(line["source_warp_error_raft"]) > 0
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["videos"]
    assert "lpips_alex_rest" in found["figures"] and "warp_error_raft" in found["source"]
    page = (tmp_path / "out" / "metrics.html").read_text()
    assert all(f"{name}" in page and measure.FIGURES[name].split("'")[0] in page for name in rows if "_r" in name)
    assert "--lpips /none is no file; download alexnet-" in tav("metrics", *given, "--lpips", "/none", fails=True)


@pytest.mark.slow
def test_evaluate(files, tav, tmp_path):
    save_video(clip(), tmp_path / "ball.mp4", 8)
    (tmp_path / "clips.yaml").write_text("- {video: ball.mp4, prompt: a red ball, edits: {own: a blue ball}}")
    given = ["--checkpoint", "mini", "--dataset", tmp_path / "clips.yaml", "--frames", 2, "--size", 32, "--steps", 1]
    given += ["--sampling-steps", 1, "--device", "cpu", "--output", tmp_path / "out", "--lpips", files["squeeze"]]
    told = tav("evaluate", *given, "--raft", files["raft"], fails=True)
    assert "--raft takes frames of 128 pixels or more a side, not of 32x32" in told and not (tmp_path / "out").exists()
    assert "lpips_squeeze_rest" in tav("evaluate", *given)
    for name in ("metrics.csv", "summary.csv"):
        line = next(csv.DictReader((tmp_path / "out" / name).read_text().splitlines()))
        assert float(line["lpips_squeeze_rest"]) > 0 and "warp_error_raft" not in line


def test_files_that_hold_something_else(files, tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"spoiled")
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "part.safetensors")
    torch.save([1], tmp_path / "list.pth")
    for call, kind in (
        (perceptual.load_lpips, "an AlexNet or a SqueezeNet 1.1"),
        (perceptual.load_raft, "a raft_large"),
    ):
        refused("is no file; download .*https://download.pytorch.org/models/", tmp_path, call=call)
        for name in ("bad.pth", "part.safetensors", "list.pth"):
            refused(f"can't be read as {kind} of torchvision", tmp_path / name, call=call)
    refused("can't be read as", files["raft"], call=perceptual.load_lpips)


def test_a_pickle_that_would_run_code_is_refused(perceptual, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path / "ran").write_text, ("x",)

    from tav_core.perceptual import load_raft

    torch.save({"a": Trap()}, tmp_path / "trap.pth")
    refused("can't be read as a raft_large", tmp_path / "trap.pth", call=load_raft)
    assert not (tmp_path / "ran").exists()


def test_what_to_install(files, monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lpips", "torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    for call, file in ((perceptual.load_lpips, files["alex"]), (perceptual.load_raft, files["raft"])):
        refused("doesn't fit torch .*nms does not exist.*; install the one that was built for it", file, call=call)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    refused("lpips needs the package lpips, .*; run pip install lpips$", files["alex"], call=perceptual.load_lpips)
    refused("raft needs .*; run pip install torchvision$", files["raft"], call=perceptual.load_raft)


def test_frames_that_are_too_small(files, raft, videos):
    models = measure.Models(raft=raft, lpips=perceptual.load_lpips(files["squeeze"]))
    refused("raft takes frames of 128 pixels or more a side, not of 72x56", "a", *videos, "x", models=models,
            call=measure.measure)  # fmt: skip
    refused("lpips takes frames of 32", 200, 31, call=models.check_frames)
    small = [video[:, :32, :40] for video in videos]  # the smallest that both networks take
    for net in ("alex", "squeeze"):
        assert perceptual.lpips_distance(perceptual.load_lpips(files[net]), *small) > 0


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_asked_for():
    program = "import sys; sys.modules |= dict.fromkeys(['lpips', 'torchvision']); import tav_core.cli"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr == ""


@pytest.mark.slow
def test_another_device_finds_the_same(files, videos, tmp_path):
    """See `support/accelerator.py`."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices written in Python")
    frames = [video.repeat(1, 3, 2, 1)[:, :130, :136].contiguous() for video in videos]
    save_file({"edit": frames[0], "source": frames[1]}, tmp_path / "frames.safetensors")
    program = f"""
from support import accelerator, comfyui_install
comfyui_install.enable_torchvision(comfyui_install.Path({str(tmp_path)!r}))
accelerator.register()
import torch
from safetensors.torch import load_file
from tav_core import measure, perceptual
frames = load_file({str(tmp_path / "frames.safetensors")!r})
edit, source = frames["edit"], frames["source"]
models = measure.load_models(lpips={str(files["squeeze"])!r}, raft={str(files["raft"])!r})
flow = perceptual.raft_flow(models.raft)
for device in ("cpu", "npu"):
    models.to(torch.device(device))
    print(perceptual.lpips_distance(models.lpips, edit, source), abs(flow(*source.numpy())).mean())
"""
    paths = [str(ROOT), str(ROOT / "tests"), *(path for path in sys.path if path.endswith("packages_apart"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    cpu, npu = ([float(word) for word in line.split()] for line in done.stdout.splitlines())
    assert cpu == pytest.approx(npu, rel=1e-4) and min(cpu) > 0
