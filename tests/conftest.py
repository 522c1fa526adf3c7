import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from support.comfyui_install import SITE, comfyui_path, enable
from tav_core.checkpoint import CONFIGS, MINI, load_checkpoint
from tav_core.errors import TavError

ROOT = Path(__file__).parents[1]

# the models are tiny: more threads only wait for each other, for minutes on a busy machine
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def torch_home(tmp_path_factory):
    """What is measured of attention in the tests stays there, also in processes that they start."""
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch"))


def make_folder(folder: Path, cross: int = 32, **scheduler) -> Path:
    """A tiny diffusers folder of the layout of Stable Diffusion, random weights."""
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=2,
        norm_num_groups=8,
        cross_attention_dim=cross,
        attention_head_dim=4,
        use_linear_projection=cross == 1024,
    ).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=64,
    ).save_pretrained(folder / "vae")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408 if cross == 32 else 64,
            hidden_size=cross,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).save_pretrained(folder / "text_encoder")
    CLIPTokenizer.from_pretrained(CONFIGS / "tokenizer").save_pretrained(folder / "tokenizer")
    DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        set_alpha_to_one=False,
        steps_offset=1,
        **scheduler,
    ).save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="session")
def checkpoint(folder):
    return load_checkpoint(folder)


@pytest.fixture(scope="session")
def server(request, tmp_path_factory):
    """A ComfyUI with this pack, the demo clip in its input folder and a second checkpoint beside the mini one."""
    from support.comfyui_server import Server  # needs packages that only the tests with a server need

    comfyui = comfyui_path(request.config.cache.mkdir("comfyui"))
    server = Server(comfyui, tmp_path_factory.mktemp("comfyui"))
    tiny = make_folder(server.home / "models" / "diffusers" / "tiny")
    (tiny / "model_index.json").write_text("{}")
    shutil.copy(MINI.parent / "demo.mp4", server.home / "input" / "clip.mp4")
    shutil.copy(ROOT / "tests" / "support" / "short_of_memory.py", server.home / "custom_nodes")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def inference_mode():
    with torch.inference_mode():  # as ComfyUI runs its nodes
        yield


@pytest.fixture(scope="session")
def pack(request):
    """The pack as ComfyUI imports it, beside the `tav_core` of the tests."""
    enable(comfyui_path(request.config.cache.mkdir("comfyui")))
    spec = importlib.util.spec_from_file_location(
        "tune_a_video", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = sys.modules["tune_a_video"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for node in module.nodes.NODES:
        node.GET_SCHEMA()
        node.hidden = type("Hidden", (), dict(unique_id="1", prompt=None, extra_pnginfo=None))
    module.nodes.invert.report = module.nodes.tune.report = module.nodes.tune.show = lambda node, shown: None
    return module


@pytest.fixture(scope="module")
def mini(pack):
    """The nodes' MODEL, CLIP, VAE and clip, and tav_core's own."""
    nodes = pack.nodes
    model, text, vae = nodes.LoadCheckpoint.execute("mini").args
    images, fps, count = nodes.LoadVideo.execute(nodes.load_video.DEMO, 0, 2, 4, 128, 128, "crop").args
    assert (tuple(images.shape), fps, count) == ((4, 128, 128, 3), 4.0, 4)

    class Mini:
        checkpoint = load_checkpoint("mini")
        latent = {"samples": vae.encode(images)}
        inflated = nodes.Inflate.execute(model, "sparse-causal", False, "video").args[0]

        @staticmethod
        def encode(words):
            return text.encode_from_tokens_scheduled(text.tokenize(words))

    Mini.model, Mini.vae, Mini.images = model, vae, images
    Mini.latents = model.model.process_latent_in(Mini.latent["samples"]).movedim(0, 1)[None]
    return Mini


@pytest.fixture
def without_comfyui(monkeypatch):
    """For processes that take over this one's path: it isn't ComfyUI's, which other tests may have added to it."""
    homes = [Path(path).parent for path in sys.path if Path(path).name == SITE]
    monkeypatch.setattr(
        sys, "path", [path for path in sys.path if not {Path(path), Path(path).parent}.intersection(homes)]
    )


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def write(path: Path, tensors: dict, metadata=None) -> Path:
    save_file({name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata)
    return path


def refused(told, *args, call=load_checkpoint, **kwargs):
    with pytest.raises(TavError, match=told) as error:
        call(*args, **kwargs)
    assert len(str(error.value).splitlines()) == 1
