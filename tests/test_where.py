"""Where a checkpoint is found by its name: in a ComfyUI's lists, in the Hugging Face cache; and what is said if not."""

import pytest
from huggingface_hub import constants

from support.errors import refused
from tav_core.checkpoint import load_checkpoint
from tav_core.where import MINI, find_checkpoint, find_model


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty cache, and no ComfyUI."""
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def comfyui(tmp_path):
    home = tmp_path / "ComfyUI"
    for file in ("models/checkpoints/v1-5-pruned-emaonly-fp16.safetensors", "models/checkpoints/SD/dream.safetensors",
                 "models/checkpoints/a/twice.safetensors", "models/checkpoints/b/twice.safetensors",
                 "models/diffusers/sd15/model_index.json", "elsewhere/more/old.safetensors"):  # fmt: skip
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).touch()
    return home


def test_names_of_a_comfyui(comfyui, monkeypatch):
    lists = comfyui / "models"
    found = {
        "v1-5-pruned-emaonly-fp16.safetensors": lists / "checkpoints/v1-5-pruned-emaonly-fp16.safetensors",
        "SD/dream.safetensors": lists / "checkpoints/SD/dream.safetensors",
        "dream.safetensors": lists / "checkpoints/SD/dream.safetensors",
        "b/twice.safetensors": lists / "checkpoints/b/twice.safetensors",
        "sd15": lists / "diffusers/sd15",
    }
    assert {name: find_checkpoint(name, comfyui) for name in found} == found
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    assert find_checkpoint("sd15") == found["sd15"] and find_checkpoint("mini") == MINI
    refused("is no path that exists", "twice.safetensors", call=find_checkpoint)  # which of the two?
    refused("on this machine: ", None, call=find_checkpoint)


def test_other_folders_of_a_comfyui(comfyui):
    paths = comfyui / "extra_model_paths.yaml"
    paths.write_text("other:\n  base_path: elsewhere\n  checkpoints: |\n    none\n    more\nnothing:\n  loras: x\n")
    assert find_checkpoint("old.safetensors", comfyui) == comfyui / "elsewhere" / "more" / "old.safetensors"
    paths.write_text("other: [")
    refused("extra_model_paths.yaml' can't be read", "old.safetensors", comfyui, call=find_checkpoint)
    refused("is no ComfyUI", "old.safetensors", comfyui / "models", call=find_checkpoint)


def test_names_of_other_models(comfyui):
    loras = comfyui / "models" / "loras"
    for file in (loras / "style.safetensors", loras / "old" / "style.safetensors", loras / "old" / "neon.safetensors"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (comfyui / "extra_model_paths.yaml").write_text(f"comfyui:\n  base_path: {comfyui}\n  loras: models/loras\nb:\n")

    def found(name):
        return find_model("lora", name, "loras", comfyui)

    assert found("style.safetensors") == found("style") == loras / "style.safetensors"  # a whole name comes first
    assert found("neon") == found("old/neon.safetensors") == loras / "old" / "neon.safetensors"  # two lists have it
    (loras / "neon").mkdir()
    (loras / "new").mkdir()
    (loras / "new" / "sky.safetensors").touch()
    (loras / "old" / "sky.safetensors").touch()
    refused("sky' is several in", "sky", call=found)


def test_the_cache_of_the_hub(cache, folder):
    snapshot = cache / "models--someone--tiny-sd" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (cache / "models--someone--tiny-sd" / "refs").mkdir()
    (cache / "models--someone--tiny-sd" / "refs" / "main").write_text("0" * 40)
    snapshot.symlink_to(folder)
    assert find_checkpoint("someone/tiny-sd") == snapshot
    assert load_checkpoint("someone/tiny-sd").name == "tiny-sd"  # and not the hash
    assert find_checkpoint("someone/tiny-sd/unet/config.json") == snapshot / "unet" / "config.json"
    for name in ("someone/other", "someone/tiny-sd/none.safetensors", "x" * 200 + "/y", "someone/..", "a/b\n"):
        refused("is no path that exists", name, call=find_checkpoint)


def test_what_is_said_of_a_name_that_is_nowhere(comfyui, cache):
    refused(f"neither in the lists of the ComfyUI in {comfyui} nor in the Hugging Face cache .{cache}.; "
            "did you mean v1-5-pruned-emaonly-fp16.safetensors?",
            "v1-5-pruned-emaonly.safetensors", comfyui, call=find_checkpoint)  # fmt: skip
    refused("none was named by comfyui or COMFYUI_PATH.*give one of Stable Diffusion 1.5, such as v1-5-pruned-emaonly-"
            "fp16.safetensors .2.1 GB", "v1-5", call=find_checkpoint)  # fmt: skip
