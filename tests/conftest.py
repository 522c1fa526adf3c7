"""Fixtures of several test modules, and the markers that tests get by them.

What only tests with a ComfyUI need is imported by their fixtures, so that the others run without it.
"""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from tav_core import cli
from tav_core.checkpoint import MINI, load_checkpoint

pytest.register_assert_rewrite("support")
ROOT = Path(__file__).parents[1]
SLOW = 15  # seconds that the processor may work for a test without that marker

# the models are tiny: more threads only wait for each other, for minutes on a busy machine
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell has it in the background: servers would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


class PlainFolder:
    """Collects the folder of the pack as any other: its `__init__.py`, which pytest would import, needs ComfyUI."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path, parent):
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config):
    config.pluginmanager.register(PlainFolder())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        for name in ("comfyui", "browser"):
            if name in item.fixturenames:
                item.add_marker(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Tells of tests that lack the marker slow. Clocks would tell of others where a machine is busy."""
    before = sum(os.times()[:4])  # of this process and of those that it waited for
    result = yield
    seconds = sum(os.times()[:4]) - before
    if seconds > SLOW and not {mark.name for mark in item.iter_markers()} & {"slow", "comfyui", "browser"}:
        item.warn(pytest.PytestWarning(f"took the processor {seconds:.0f} s; it needs the marker slow"))
    return result


@pytest.fixture(scope="session", autouse=True)
def torch_home(tmp_path_factory):
    """What is measured of attention in the tests stays there, also in processes that they start."""
    os.environ["TORCH_HOME"] = str(tmp_path_factory.mktemp("torch"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny checkpoint as a folder of diffusers."""
    from support.checkpoints import make_folder

    return make_folder(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="session")
def checkpoint(folder):
    return load_checkpoint(folder)


@pytest.fixture
def tav(monkeypatch, capsys):
    """Runs a command in this process, which has imported all: what it prints, or with `fails` its error."""

    def run(*args, fails=False, main=cli.main) -> str:
        monkeypatch.setattr(sys, "argv", ["tav_core", *map(str, args)])
        handler = signal.getsignal(signal.SIGINT)
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            signal.signal(signal.SIGINT, handler)
        out, told = capsys.readouterr()
        assert code == (2 if fails else 0), told
        return told.strip() if fails else out

    return run


@pytest.fixture(scope="session")
def comfyui(request) -> Path:
    """The folder of a ComfyUI."""
    from support.comfyui_install import comfyui_path

    return comfyui_path(request.config.cache.mkdir("comfyui"))


@pytest.fixture(scope="session")
def perceptual(request):
    """LPIPS and torchvision can be imported."""
    from support.comfyui_install import enable_perceptual

    enable_perceptual(request.config.cache.mkdir("perceptual"))


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A running ComfyUI with this pack, the demo clip in its input folder, a second checkpoint beside the mini one."""
    from support.checkpoints import make_folder
    from support.comfyui_server import Server

    server = Server(comfyui, tmp_path_factory.mktemp("comfyui"))
    tiny = make_folder(server.home / "models" / "diffusers" / "tiny")
    (tiny / "model_index.json").write_text("{}")
    shutil.copy(MINI.parent / "demo.mp4", server.home / "input" / "clip.mp4")
    shutil.copy(ROOT / "tests" / "support" / "short_of_memory.py", server.home / "custom_nodes")
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def info(server):
    """What the server tells of its nodes."""
    return server.get("/object_info")


@pytest.fixture
def graph(info):
    """A graph that begins with the demo clip and the mini checkpoint, inflated."""
    from support.comfyui_server import Graph

    return Graph(info).source()


@pytest.fixture(scope="module")
def browser():
    """The Chromium of the system."""
    from playwright.sync_api import sync_playwright

    from support.browser_install import chromium

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, server):
    """The page of the frontend, one for a module."""
    from support.browser import visit

    return visit(browser, server)


@pytest.fixture(scope="module")
def inference_mode():
    with torch.inference_mode():  # as ComfyUI runs its nodes
        yield


@pytest.fixture(scope="session")
def pack(comfyui):
    """The pack as ComfyUI imports it, beside the `tav_core` of the tests."""
    from support.comfyui_install import enable

    enable(comfyui)
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
    images, fps, count, audio = nodes.LoadVideo.execute(nodes.load_video.DEMO, 0, 2, 4, 128, 128, "crop").args
    assert (tuple(images.shape), fps, count, audio) == ((4, 128, 128, 3), 4.0, 4, None)

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
    from support.comfyui_install import SITE

    homes = [Path(path).parent for path in sys.path if Path(path).name == SITE]
    monkeypatch.setattr(
        sys, "path", [path for path in sys.path if not {Path(path), Path(path).parent}.intersection(homes)]
    )
