"""Every stage on a device that isn't the CPU: nothing is left behind, and the result is that of the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration
from safetensors.torch import load_file

from support import ROOT
from support.comfyui_install import has_dynamic_vram
from support.comfyui_server import SOURCE, Graph, Server, pictures
from tav_core import load_video, save_video
from tav_core.checkpoint import MINI
from tav_core.mini import world

ACCELERATOR = ROOT / "tests" / "support" / "accelerator.py"
EDIT = [
    "edit", "--checkpoint", "mini", "--prompt", "a red ball is sliding on the grass", "--frames", "3", "--steps", "1",
    "--sampling-steps", "2",
    "--edit", "a blue ball is sliding on the grass", "--region", "subject", "--contrast", "a blue star is sliding on "
                                                                                          "the grass",
    "--edit", "a red ball is sliding on the snow", "--region", "background",
]  # fmt: skip
pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)


def python(*arguments) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, env=env)


def edited(output: Path, *arguments) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The videos of a short edit, and its inverted noise and mask."""
    clip = output.parent / "clip.mp4"
    save_video(torch.from_numpy(world.render_clip(world.clip_scenes(world.Scene(), "slide", 5))), clip, 8)
    done = python(*arguments, "--video", clip, "--output", output)
    assert done.returncode == 0, done.stderr
    summary = json.loads((output / "summary.json").read_text())
    files = [each["file"] for each in (summary["reconstruction"], *summary["edits"])]
    return torch.stack([load_video(output / name).frames.float() for name in files]), load_file(
        output / "noise.safetensors"
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return edited(tmp_path_factory.mktemp("cpu") / "edit", "-m", "tav_core", *EDIT)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, memory, error, difference", [("fp32", "fast", 1e-5, 1), ("bf16", "low", 0.02, 2.5)])
def test_an_edit_stays_on_its_device_and_ends_as_on_the_cpu(expected, dtype, memory, error, difference, tmp_path):
    on = ["--device", "npu", "--dtype", dtype, "--memory", memory]
    videos, found = edited(tmp_path / "edit", ACCELERATOR, *EDIT, *on)
    noise = expected[1]["latents"]
    assert (found["latents"] - noise).norm() / noise.norm() < error
    assert (found["subject"] - expected[1]["subject"]).abs().mean() < error
    assert (
        videos - expected[0]
    ).abs().mean() < difference  # a level of one pixel makes the codec draw others a little otherwise


@pytest.mark.slow
def test_windows_of_a_long_clip_stay_on_their_device(tmp_path):
    windows = ["--device", "npu", "--frames", "5", "--context-length", "3", "--context-overlap", "2"]
    edited(tmp_path / "edit", ACCELERATOR, *EDIT[:-4], *windows)


@pytest.mark.slow
def test_the_benchmark_stays_on_its_device():
    options = ["bench", "--device", "npu", "--gpu", "--layout", "small", "--size", "8", "--frames", "2",
               "--dtype", "fp32", "--memory", "selective",
               "--runs", "1", "--threads", "1", "--no-memory"]  # fmt: skip
    lines = ["import sys", "from support import accelerator", "accelerator.register()", "from tav_core import bench",
             "from tav_core.cli import main",
             "edit = bench.Workload.edit", "bench.Workload.edit = lambda self, mode: edit(self, mode, steps=2)",
             f"sys.argv[1:] = {options}", "main()"]  # fmt: skip
    done = python("-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert "share of the matmul rate" in done.stdout


@pytest.mark.slow
def test_what_a_stage_does_not_need_waits_on_the_cpu():
    lines = ["import torch", "from support import accelerator", "accelerator.register()", "from tav_core.memory "
                                                                                          "import offloaded",
             "model = torch.nn.Linear(2, 2).to('npu')", "before = model.weight.detach().cpu()",
             "try:", "    with offloaded(model):", "        assert model.weight.device.type == 'cpu'",
             "        raise KeyboardInterrupt",
             "except KeyboardInterrupt:", "    assert model.weight.device.type == 'npu'",
             "assert torch.equal(model.weight.detach().cpu(), before)",
             # so a preview has its text from there
             "from tav_core.condition import Condition, predict",
             "model.forward = lambda latents, t, text: latents * text.mean()", "model.dtype = torch.float32",
             "predicted = predict(model, torch.ones(1, device='npu'), 0, Condition(torch.full((1, 2, 3), 4.0)))",
             "assert predicted.cpu().item() == 4"]  # fmt: skip
    done = python("-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr


MISTAKES = {
    "there + here": "is on cpu, another on npu", "torch.cat([there, here])": "is on cpu, another on npu",
    "there.normal_(generator=torch.Generator())": "the generator is on cpu", "there.numpy()": "not supported",
}  # fmt: skip


def test_what_a_gpu_refuses_is_refused():
    lines = ["import torch", "from support import accelerator", "accelerator.register()", "there, here = "
                                                                                          "torch.ones(2, "
                                                                                          "device='npu'), "
                                                                                          "torch.ones(2)",
             "assert (there + here.to(there.device) + here.sum()).cpu().tolist() == [4, 4]"]  # fmt: skip
    for mistake in MISTAKES:
        lines += ["try:", f"    {mistake}", "    print('taken')", "except RuntimeError as error:", "    print(error)"]
    done = python("-c", "\n".join(lines))
    assert done.returncode == 0, done.stderr
    for said, expected in zip(done.stdout.splitlines(), MISTAKES.values(), strict=True):
        assert expected in said


# memory of the device, of 1 GB ComfyUI puts none by for weights; and what is for weights under dynamic VRAM: of 1 GB
# all of them, of 5 MB a part of each model
MEMORY = {"whole models": (16_000_000_000, None), "models in parts": (1_000_000_000, None),
          "dynamic VRAM": (16_000_000_000, 1_000_000_000),
          "little dynamic VRAM": (16_000_000_000, 5_000_000)}  # fmt: skip


@pytest.fixture(params=MEMORY)
def accelerated(request, comfyui, tmp_path):
    """A ComfyUI that has the device for its GPU."""
    memory, dynamic = MEMORY[request.param]
    environment = {"PRETEND_ACCELERATOR": str(memory)}
    if dynamic:
        if not has_dynamic_vram(comfyui):
            pytest.skip("this ComfyUI has no dynamic VRAM; COMFYUI_PATH may name one that has")
        environment["PRETEND_DYNAMIC_VRAM"] = str(dynamic)
    server = Server(comfyui, tmp_path, **environment)
    shutil.copy(MINI.parent / "demo.mp4", server.home / "input" / "clip.mp4")
    server.start()
    yield server
    server.stop()


def test_nodes_work_on_the_gpu_of_comfyui(accelerated, server, request):
    graph = Graph(accelerated.get("/object_info")).source(frames=4)
    contrast = graph("CLIPTextEncode", clip=graph.clip, text="a blue star is sliding on the grass")[0]
    tuned = graph.tune(steps=2, preview_every=2, preview_prompt=graph.edit, vae=graph.vae)
    again = graph("TAVApplyTunedWeights", model=graph.inflated, tuned_weights=tuned[1])[0]
    noise = graph.invert(tuned[0], steps=2)[0]
    found = dict(model=tuned[0], latent=graph.latent, images=graph.video[0])
    subject = graph("TAVSubjectMask", **found, conditioning=graph.said, contrast=contrast)[0]
    word = graph("TAVWordMask", **found, clip=graph.clip, sentence=SOURCE, word="ball", steps=2)[0]
    hint = graph("MaskToImage", mask=subject)[0]
    net = graph("TAVLoadControlNet", controlnet="mini")[0]
    positive, negative = graph(
        "ControlNetApplyAdvanced",
        positive=graph.edit,
        negative=graph.empty,
        control_net=net,
        image=hint,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )[:2]
    lora = graph("LoraLoaderModelOnly", model=tuned[0], lora_name="mini-neon.safetensors", strength_model=0.5)[0]
    led = {
        region: graph(
            "TAVAttentionInjection", model=model, conditioning=graph.empty, share=0.7, region=region, subject=mask
        )[0]
        for region, model, mask in (("subject", again, subject), ("background", lora, subject))
    }
    hooks = graph("CreateHookLoraModelOnly", lora_name="mini-neon.safetensors", strength_model=1.0)[0]
    hooked = graph(
        "ConditioningSetProperties", cond_NEW=graph.edit, strength=1.0, set_cond_area="default", hooks=hooks
    )[0]
    windows = graph("TAVContextWindows", model=graph.inflated, context_length=3, context_overlap=2)[0]
    sampled = [
        graph.sample(led["background"], noise, steps=2),
        graph.sample(led["subject"], noise, steps=2),
        graph.sample(tuned[0], noise, steps=1, positive=positive, negative=negative),
        graph.sample(tuned[0], noise, steps=1, positive=hooked),
        graph.sample(windows, noise, steps=2, add_noise=True),
        graph.sample(tuned[0], graph("SetLatentNoiseMask", samples=noise, mask=subject)[0], steps=2),
    ]
    frames = [graph("SaveImage", images=graph("VAEDecode", samples=each[0], vae=graph.vae)[0]) for each in sampled]
    found_by_word = graph("SaveImage", images=graph("MaskToImage", mask=word)[0])
    outputs, expected = accelerated.run(graph), server.run(graph)
    log = accelerated.log.read_text()
    assert "load device: npu:0" in log and "model weight dtype torch.float16" in log
    assert ("loaded partially" in log) == ("models in parts" in request.node.name)
    assert ("prepared for dynamic VRAM" in log) == ("dynamic VRAM" in request.node.name)
    masks = [pictures(on, of, found_by_word) for on, of in ((accelerated, outputs), (server, expected))]
    assert masks[0].shape == masks[1].shape  # where this model looks at a word is a matter of rounding
    for images in frames:
        found, wanted = pictures(accelerated, outputs, images), pictures(server, expected, images)
        assert wanted.std() > 20 and (found - wanted).abs().mean() < 3
