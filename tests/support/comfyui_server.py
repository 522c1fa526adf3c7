"""A ComfyUI server for the tests, with this pack in it, and a client that queues prompts as the frontend does."""

import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import websocket
from PIL import Image

from support import ROOT
from tav_core import load_video

TEXT, PREVIEW = 3, 4  # binary events of its protocol.py
FRAMES, SIZE, STEPS = 4, 64, 4
SOURCE, EDIT = "a red ball is sliding on the grass", "a blue ball is sliding on the sand"
PATIENCE = 180  # seconds without a message, after which something hangs


class Refused(Exception):
    """A prompt that isn't valid. `details`: every word that the server has for it."""

    def __init__(self, body: str):
        super().__init__(body)
        self.details = body


class Failed(Exception):
    """A prompt that a node ended with an error. `node` is its class, `message` what it said."""

    def __init__(self, node: str, message: str):
        super().__init__(f"{node}: {message}")
        self.node, self.message = node, message


class Interrupted(Exception):
    """A prompt that was cancelled."""


class Server:
    """A running server.

    Attributes:
        url: its address.
        home: its base directory, with models, input, output, temp and user.
        log: file of what it prints.
        messages: everything that came over the websocket: dicts of type and data, where previews (type "preview") have
            an image and their node, and the lines in nodes (type "text") a text and their node.
    """

    def __init__(self, comfyui: Path, home: Path, **environment: str):
        self.comfyui, self.home, self.log, self.environment = comfyui, home, home / "server.log", environment
        for name in ("models/diffusers", "input", "output", "temp", "user", "custom_nodes"):
            (home / name).mkdir(parents=True, exist_ok=True)
        (home / "custom_nodes" / "tune-a-video").symlink_to(ROOT)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.messages: list[dict] = []

    def start(self):
        command = [sys.executable, str(ROOT / "tests" / "support" / "comfyui_install.py"), str(self.comfyui),
                   "--port", str(self.port),
                   "--base-directory", str(self.home), "--database-url", "sqlite:///:memory:", "--disable-api-nodes",
                   "--disable-auto-launch", "--preview-method", "latent2rgb"]  # fmt: skip
        # several threads would only wait for each other: the models are tiny
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | self.environment
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.get("/queue")
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError(f"ComfyUI did not start:\n{self.tail()}") from None
                time.sleep(0.2)
        self.client = uuid.uuid4().hex
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/ws?clientId={self.client}", timeout=PATIENCE
        )
        self.socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))

    def stop(self):
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self):
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def restart(self):
        self.stop()
        self.start()

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict) -> str:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def queue(self, prompt: dict) -> str:
        """Queues a prompt in API format and tells its id.

        Raises:
            Refused: the server finds it, or a part of it, invalid.
        """
        try:
            answer = json.loads(self.post("/prompt", {"prompt": prompt, "client_id": self.client}))
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode()) from error
        if answer["node_errors"]:
            raise Refused(json.dumps(answer["node_errors"]))
        return answer["prompt_id"]

    def interrupt(self):
        self.post("/interrupt", {})

    def until(self, wanted: Callable[[dict], bool]) -> dict:
        """Reads messages up to the first that is wanted."""
        while True:
            try:
                message = _decoded(self.socket.recv())
            except (websocket.WebSocketException, OSError) as error:
                raise RuntimeError(f"ComfyUI is silent:\n{self.tail()}") from error
            self.messages.append(message)
            if wanted(message):
                return message

    def wait(self, prompt_id: str) -> dict[str, dict]:
        """The outputs of a prompt, by node, when it is done.

        Raises:
            Failed, Interrupted
        """
        self.until(
            lambda m: m["type"] == "executing" and m["data"]["node"] is None and m["data"]["prompt_id"] == prompt_id
        )
        history = self.get(f"/history/{prompt_id}")[prompt_id]
        for kind, data in history["status"]["messages"]:
            if kind == "execution_error":
                raise Failed(data["node_type"], data["exception_message"].strip())
            if kind == "execution_interrupted":
                raise Interrupted
        return history["outputs"]

    def run(self, prompt: dict) -> dict[str, dict]:
        """Queues a prompt and waits for its outputs. `messages` are those of this prompt alone then."""
        self.messages.clear()
        return self.wait(self.queue(prompt))

    def file(self, entry: dict) -> Path:
        """The path of a file that an output speaks of."""
        return self.home / entry["type"] / entry["subfolder"] / entry["filename"]


def _decoded(raw: str | bytes) -> dict:
    if isinstance(raw, str):
        return json.loads(raw)
    (event, size), body = struct.unpack_from(">II", raw), raw[8:]
    if event == TEXT:
        return {"type": "text", "data": {"node": body[:size].decode(), "text": body[size:].decode()}}
    if event == PREVIEW:
        told = json.loads(body[:size])
        return {"type": "preview", "data": {"node": told["node_id"], "image": Image.open(io.BytesIO(body[size:]))}}
    return {"type": f"binary {event}", "data": raw[4:]}


class Out(list):
    """The outputs of a node, as links to them. `id` is its own."""

    id: str


def _defaults(inputs: dict[str, dict], prefix: str = "") -> dict[str, Any]:
    """Those of the required inputs. In newer cores a choice may have inputs of its own, which a dot sets apart."""
    defaults = {}
    for name, (of, *options) in inputs.get("required", {}).items():
        choices = of if isinstance(of, list) else options[0].get("options") if options else None
        if options and "default" in options[0]:
            defaults[prefix + name] = options[0]["default"]
        elif choices and isinstance(choices[0], dict):
            defaults |= {prefix + name: choices[0]["key"]} | _defaults(choices[0]["inputs"], f"{prefix}{name}.")
        elif choices:
            defaults[prefix + name] = choices[0]
    return defaults


class Graph(dict):
    """A prompt in API format. Inputs that aren't given take the defaults that the server tells, as in the frontend."""

    def __init__(self, info):
        super().__init__()
        self.info = info

    def __call__(self, kind, **inputs) -> Out:
        defaults = _defaults(self.info[kind]["input"])
        out = Out()
        out.id = str(len(self) + 1)
        out += [[out.id, i] for i in range(len(self.info[kind]["output"]))]
        self[out.id] = {"class_type": kind, "inputs": defaults | inputs}
        return out

    def source(self, file="clip.mp4", frames=FRAMES, size=SIZE, checkpoint="mini"):
        """Nodes up to the inflated MODEL and the LATENT of the clip, with the same ids in every graph."""
        self.video = self("TAVLoadVideo", file=file, count=frames, width=size, height=size)
        self.model, self.clip, self.vae = self("TAVLoadCheckpoint", checkpoint=checkpoint)
        self.latent = self("VAEEncode", pixels=self.video[0], vae=self.vae)[0]
        self.said = self("CLIPTextEncode", clip=self.clip, text=SOURCE)[0]
        self.edit = self("CLIPTextEncode", clip=self.clip, text=EDIT)[0]
        self.empty = self("CLIPTextEncode", clip=self.clip, text="")[0]
        self.inflated = self("TAVInflate", model=self.model)[0]
        return self

    def tune(self, **inputs) -> Out:
        inputs = (
            dict(model=self.inflated, latent=self.latent, positive=self.said, steps=6, learning_rate=1.5e-3) | inputs
        )
        return self("TAVOneShotTune", **inputs)

    def invert(self, model, **inputs) -> Out:
        return self(
            "TAVDDIMInversion", **dict(model=model, latent=self.latent, conditioning=self.empty, steps=STEPS) | inputs
        )

    def sample(self, model, noise, **inputs) -> Out:
        inputs = dict(model=model, noise=noise, positive=self.edit, negative=self.empty, steps=STEPS, cfg=5.0) | inputs
        return self("TAVVideoSampler", **inputs)


def pictures(server, outputs, node):
    """What a SaveImage wrote, 0 to 255."""
    return torch.cat([load_video(server.file(entry)).frames for entry in outputs[node.id]["images"]]).float()


def refused(server, graph, told):
    """A graph that is not queued, and what its error says."""
    with pytest.raises(Refused) as error:
        server.queue(graph)
    for part in told:
        assert part in error.value.details
    assert "traceback" not in error.value.details


def fails(server, graph, node, told):
    """A graph that ends in an error of a node, in one line."""
    with pytest.raises(Failed) as error:
        server.run(graph)
    assert error.value.node == node
    assert told in error.value.message
    assert len(error.value.message.splitlines()) == 1
