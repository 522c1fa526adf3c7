"""The nodes in a running ComfyUI, as the frontend uses them: over HTTP and a websocket, in a process that lives on."""

import json
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from support import ROOT
from support.comfyui_server import EDIT, FRAMES, SIZE, SOURCE, STEPS, Graph, Interrupted, fails, pictures
from tav_core import load_video
from workflows import queue_folder

NODES = {
    "TAVLoadVideo": "Load Video (Tune-A-Video)",
    "TAVLoadVideoFolder": "Load Video Folder (Tune-A-Video)",
    "TAVLoadCheckpoint": "Load Checkpoint (Tune-A-Video)",
    "TAVLoadControlNet": "Load ControlNet (diffusers)",
    "TAVInflate": "Inflate (Tune-A-Video)",
    "TAVOneShotTune": "One-Shot Tune (Tune-A-Video)",
    "TAVTake": "Take (Tune-A-Video)",
    "TAVSaveTunedWeights": "Save Tuned Weights (Tune-A-Video)",
    "TAVLoadTunedWeights": "Load Tuned Weights (Tune-A-Video)",
    "TAVApplyTunedWeights": "Apply Tuned Weights (Tune-A-Video)",
    "TAVContextWindows": "Context Windows (Tune-A-Video)",
    "TAVDDIMInversion": "DDIM Inversion (Tune-A-Video)",
    "TAVSaveInvertedNoise": "Save Inverted Noise (Tune-A-Video)",
    "TAVLoadInvertedNoise": "Load Inverted Noise (Tune-A-Video)",
    "TAVSubjectMask": "Subject Mask (Tune-A-Video)",
    "TAVWordMask": "Word Mask (Tune-A-Video)",
    "TAVAttentionInjection": "Attention Injection (Tune-A-Video)",
    "TAVVideoSampler": "Video Sampler (Tune-A-Video)",
    "TAVPutBack": "Put Back the Clip (Tune-A-Video)",
    "TAVCompare": "Compare (Tune-A-Video)",
    "TAVMeasure": "Measure (Tune-A-Video)",
}


def latents(server, outputs, node):
    """What a SaveLatent wrote."""
    return load_file(server.file(outputs[node.id]["latents"][0]))["latent_tensor"]


def states(server):
    """Steps of the tuning runs that can be resumed, by file."""
    steps = {}
    for path in (server.home / "user" / "tune_a_video").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            steps[path] = json.loads(file.metadata()["step"])
    return steps


def steps_seen(server, node):
    """The values that a node's progress bar took; newer cores leave some out, where they come fast, but never the first
    and the last.
    """
    return [m["data"]["value"] for m in server.messages if m["type"] == "progress" and m["data"]["node"] == node.id]


def ran(server, node, first, last):
    """Whether a node's progress bar went from one step to another."""
    seen = steps_seen(server, node)
    return (seen[0], seen[-1]) == (first, last) and seen == sorted(set(seen))


@pytest.mark.parametrize("name", NODES)
def test_nodes_are_listed_and_described(info, name):
    node = info[name]
    assert node["display_name"] == NODES[name]
    assert node["category"] == "Tune-A-Video"
    assert node["python_module"] == "custom_nodes.tune-a-video"
    assert node["description"]
    for kind in ("required", "optional"):
        for _, options in node["input"].get(kind, {}).values():
            assert options["tooltip"].endswith(".")
    assert all(tooltip.endswith(".") for tooltip in node["output_tooltips"])


def test_there_are_no_other_nodes(info):
    assert {name for name, node in info.items() if node["python_module"] == "custom_nodes.tune-a-video"} == set(NODES)


def test_clip_becomes_an_edited_video_once(server, info):
    graph = Graph(info).source(frames=8, size=128)
    tuned = graph.tune(timestep_sampling="stratified")
    noise = graph.invert(tuned[0])
    sampled = graph.sample(tuned[0], noise[0])
    images = graph("VAEDecode", samples=sampled[0], vae=graph.vae)
    compared = graph("TAVCompare", images_1=graph.video[0], images_2=images[0])
    files = [
        graph("SaveVideo", video=graph("CreateVideo", images=frames, fps=graph.video[1], audio=graph.video[3])[0])
        for frames in (images[0], compared[0])
    ]
    graph("SaveImage", images=compared[1])
    error = graph("PreviewAny", source=noise[2])
    outputs = server.run(graph)
    assert {noise.id, sampled.id} <= {m["data"]["node"] for m in server.messages if m["type"] == "preview"}
    assert ran(server, sampled, 1, 4)
    assert 0 < float(outputs[error.id]["text"][0]) < 0.5

    (edited, both) = (load_video(server.file(outputs[file.id]["images"][0])) for file in files)
    source = load_video(server.home / "input" / "clip.mp4")
    assert edited.frames.shape == source.frames.shape == (8, 128, 128, 3)
    assert edited.fps == source.fps
    assert edited.frames.float().mean() > 20 and edited.frames.float().std() > 10
    assert (edited.frames.float() - source.frames.float()).abs().mean() > 5
    assert len(both.frames) == 8 and both.frames.shape[2] > 2 * 128

    # nothing changed: all is answered from the cache
    again = server.run(graph)
    assert {file.id for file in files} <= again.keys() and all(outputs[node] == again[node] for node in again)
    (cached,) = (m["data"]["nodes"] for m in server.messages if m["type"] == "execution_cached")
    assert set(cached) == set(graph)
    assert not [m for m in server.messages if m["type"] == "executing" and m["data"]["node"] is not None]


def test_progress_previews_and_loss(server, graph):
    tuned = graph.tune(seed=1, preview_every=4, preview_prompt=graph.edit, vae=graph.vae)
    graph("PreviewImage", images=tuned[2])
    losses = graph("PreviewAny", source=tuned[3])
    outputs = server.run(graph)
    assert ran(server, tuned, 1, 6)
    shown = [
        m["data"]["output"]["images"]
        for m in server.messages
        if m["type"] == "executed" and m["data"]["node"] == tuned.id
    ]
    *previews, curve = (Image.open(server.file(file)) for (file,) in shown)
    assert len(previews) == 2  # steps 4 and 6
    for picture in previews:
        assert picture.width >= FRAMES * SIZE and max(high - low for low, high in picture.getextrema()) > 50
    assert curve.size == (768, 432)
    lines = [m["data"]["text"] for m in server.messages if m["type"] == "text" and m["data"]["node"] == tuned.id]
    assert lines[-1].startswith("step 6/6, loss 0.")
    told = json.loads(outputs[losses.id]["text"][0])
    assert len(told["losses"]) == 6
    assert [step for step, _ in told["probe_losses"]] == [0, 6]


LONG = 56  # steps


def long_run(graph, name, **inputs):
    """A run whose weights and losses are kept; of so many steps that on a busy machine it can still be halted before it
    ends.
    """
    tuned = graph.tune(**dict(seed=5, steps=LONG, memory="fast") | inputs)
    graph("TAVSaveTunedWeights", tuned_weights=tuned[1], name=name, prompt=SOURCE)
    return tuned, graph("PreviewAny", source=tuned[3])


def halt_at(server, graph, tuned, step, how):
    """Queues a graph and calls `how` after a step of its tuning."""
    known = set(states(server))
    server.messages.clear()
    prompt = server.queue(graph)
    server.until(lambda m: m["type"] == "progress" and m["data"]["node"] == tuned.id and m["data"]["value"] >= step)
    how()
    return prompt, known


def test_interrupted_and_killed_tuning_goes_on_to_the_same_weights(server, info):
    graph = Graph(info).source(frames=2)
    tuned, losses = long_run(graph, "whole")
    whole = json.loads(server.run(graph)[losses.id]["text"][0])
    assert ran(server, tuned, 1, LONG)
    newest = max(states(server), key=lambda path: path.stat().st_mtime)
    assert states(server)[newest] == LONG
    newest.unlink()

    # a preview that never comes makes it another node for the cache, but the same run
    graph = Graph(info).source(frames=2)
    tuned, losses = long_run(graph, "parts", preview_every=10_000, save_every=0.0)
    prompt, known = halt_at(server, graph, tuned, 6, server.interrupt)
    with pytest.raises(Interrupted):
        server.wait(prompt)
    (kept,) = set(states(server)) - known
    interrupted_at = states(server)[kept]
    assert 6 <= interrupted_at < LONG

    halt_at(server, graph, tuned, interrupted_at + 10, server.kill)
    assert steps_seen(server, tuned)[0] == interrupted_at + 1
    server.start()
    killed_at = states(server)[kept]  # written on the way, here after every step
    assert interrupted_at + 9 <= killed_at < LONG
    parts = json.loads(server.run(graph)[losses.id]["text"][0])
    assert ran(server, tuned, killed_at + 1, LONG)
    assert parts == whole
    folder = server.home / "models" / "tune_a_video"
    files = load_file(folder / "whole.safetensors"), load_file(folder / "parts.safetensors")
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])

    # finished once, not trained again, by whatever node
    graph = Graph(info).source(frames=2)
    tuned, losses = long_run(graph, "again", preview_every=9_999)
    assert json.loads(server.run(graph)[losses.id]["text"][0]) == whole
    assert steps_seen(server, tuned) == []
    said = [m["data"]["text"] for m in server.messages if m["type"] == "text" and m["data"]["node"] == tuned.id]
    assert re.fullmatch(rf"tuned before, {LONG} steps, loss 0\.\d{{4}}", said[-1])

    # and a longer one goes on from it
    graph = Graph(info).source(frames=2)
    tuned, losses = long_run(graph, "longer", steps=LONG + 2)
    longer = json.loads(server.run(graph)[losses.id]["text"][0])
    assert ran(server, tuned, LONG + 1, LONG + 2)
    assert longer["losses"][:LONG] == whole["losses"]


def test_saved_weights_give_the_samples_of_the_tuned_model(server, info, graph):
    tuned = graph.tune()
    graph("TAVSaveTunedWeights", tuned_weights=tuned[1], name="clips/ball", prompt=SOURCE)
    saved = graph("SaveLatent", samples=graph.sample(tuned[0], graph.invert(tuned[0])[0])[0])
    directly = latents(server, server.run(graph), saved)

    graph = Graph(info).source()
    loaded = graph("TAVLoadTunedWeights", file="clips/ball.safetensors")
    model = graph("TAVApplyTunedWeights", model=graph.inflated, tuned_weights=loaded[0])[0]
    saved = graph("SaveLatent", samples=graph.sample(model, graph.invert(model)[0])[0])
    sentence = graph("PreviewAny", source=loaded[1])
    outputs = server.run(graph)
    assert outputs[sentence.id]["text"] == [SOURCE]
    again = latents(server, outputs, saved)
    assert (again - directly).abs().max() < 0.02 < directly.std()  # the file has half precision

    # another checkpoint, and another inflation
    graph = Graph(info).source(checkpoint="tiny")
    loaded = graph("TAVLoadTunedWeights", file="clips/ball.safetensors")
    model = graph("TAVApplyTunedWeights", model=graph.inflated, tuned_weights=loaded[0])[0]
    graph("SaveLatent", samples=graph.sample(model, graph.latent)[0])
    fails(server, graph, "TAVApplyTunedWeights", "tuned_weights belongs to the base model")
    graph = Graph(info).source()
    graph[graph.inflated[0]]["inputs"]["norm"] = "frame"
    loaded = graph("TAVLoadTunedWeights", file="clips/ball.safetensors")
    model = graph("TAVApplyTunedWeights", model=graph.inflated, tuned_weights=loaded[0])[0]
    graph("SaveLatent", samples=graph.sample(model, graph.latent)[0])
    fails(server, graph, "TAVApplyTunedWeights", "inflate it the same way")


def test_models_in_the_cache_stay_as_they_are(server, info, graph):
    """The inflated MODEL gives the same samples after it was tuned, and after the tuned one was sampled."""

    def samples(graph, model):
        return graph("SaveLatent", samples=graph.sample(model, graph.latent, add_noise=True, seed=3)[0])

    saved = samples(graph, graph.inflated)
    before = latents(server, server.run(graph), saved)

    tuning = Graph(info).source()
    of_tuned = samples(tuning, tuning.tune(seed=2)[0])
    assert (latents(server, server.run(tuning), of_tuned) - before).abs().max() > 1e-2

    again = latents(server, server.run(graph), saved)
    (cached,) = (m["data"]["nodes"] for m in server.messages if m["type"] == "execution_cached")
    assert graph.inflated[0] in cached and saved.id not in cached
    assert torch.equal(again, before)


def test_stock_sampler_equals_video_sampler(server, graph):
    tuned = graph.tune()
    noise = graph.invert(tuned[0])
    assert len(noise) == 3
    ours = graph("SaveLatent", samples=graph.sample(tuned[0], noise[0])[0])
    on_sigmas = graph("SaveLatent", samples=graph.sample(tuned[0], noise[0], steps=9, sigmas=noise[1])[0])
    stock = graph(
        "SaveLatent",
        samples=graph(
            "KSamplerAdvanced",
            model=tuned[0],
            add_noise="disable",
            steps=STEPS,
            cfg=5.0,
            sampler_name="euler",
            scheduler="ddim_uniform",
            positive=graph.edit,
            negative=graph.empty,
            latent_image=noise[0],
        )[0],
    )
    outputs = server.run(graph)
    expected = latents(server, outputs, ours)
    assert expected.shape == (FRAMES, 4, SIZE // 8, SIZE // 8) and expected.std() > 0.1
    assert (latents(server, outputs, stock) - expected).abs().max() < 1e-4
    assert torch.equal(latents(server, outputs, on_sigmas), expected)


def test_set_latent_noise_mask_restricts_an_edit(server, graph):
    """Left half white, by stock nodes; the rest is what the noise gives without guidance."""
    tuned = graph.tune()
    noise = graph.invert(tuned[0])[0]
    black, white = (
        graph("SolidMask", value=value, width=width, height=SIZE)[0] for value, width in ((0.0, SIZE), (1.0, SIZE // 2))
    )
    half = graph("MaskComposite", destination=black, source=white, x=0, y=0, operation="add")[0]
    masked = graph("SetLatentNoiseMask", samples=noise, mask=half)[0]
    again = graph("SaveLatent", samples=graph.sample(tuned[0], noise, positive=graph.empty, cfg=1.0)[0])
    ours = graph("SaveLatent", samples=graph.sample(tuned[0], masked)[0])
    settings = dict(
        add_noise="disable",
        steps=STEPS,
        cfg=5.0,
        sampler_name="euler",
        scheduler="ddim_uniform",
        positive=graph.edit,
        negative=graph.empty,
        latent_image=masked,
    )
    led = graph("TAVAttentionInjection", model=tuned[0], conditioning=graph.empty, share=0.0)[0]
    stock = graph("SaveLatent", samples=graph("KSamplerAdvanced", model=led, **settings)[0])
    outputs = server.run(graph)
    again, ours, stock = (latents(server, outputs, saved) for saved in (again, ours, stock))
    middle = SIZE // 16
    assert (ours - again)[..., middle:].abs().max() < 1e-3 < 0.5 < (ours - again)[..., :middle].abs().max()
    assert (stock - ours).abs().max() < 1e-3

    graph("SaveLatent", samples=graph("KSamplerAdvanced", model=tuned[0], **settings)[0])
    fails(
        server,
        graph,
        "KSamplerAdvanced",
        "connect MODEL through Attention Injection (share 0 will do), or use Video Sampler",
    )


@pytest.mark.parametrize("led", [False, True])
def test_every_stock_sampler_runs(server, info, graph, led):
    model = graph.tune()[0]
    if led:
        model = graph("TAVAttentionInjection", model=model, conditioning=graph.empty, share=0.5)[0]
    names = info["KSampler"]["input"]["required"]["sampler_name"][0]
    assert len(names) > 30
    saved = {}
    for name in names:
        sampled = graph(
            "KSampler",
            model=model,
            seed=1,
            steps=2,
            cfg=5.0,
            sampler_name=name,
            scheduler="normal",
            positive=graph.edit,
            negative=graph.empty,
            latent_image=graph.latent,
        )
        saved[name] = graph("SaveLatent", samples=sampled[0])
    outputs = server.run(graph)
    for name, node in saved.items():
        result = latents(server, outputs, node)
        assert (
            result.shape == (FRAMES, 4, SIZE // 8, SIZE // 8) and torch.isfinite(result).all() and result.std() > 0.1
        ), name


def test_stock_video_and_tiled_nodes(server, info):
    graph = Graph(info).source(size=128)
    ours = graph("SaveLatent", samples=graph.latent)
    whole = graph("VAEDecode", samples=graph.latent, vae=graph.vae)
    tiled = graph("VAEDecodeTiled", samples=graph.latent, vae=graph.vae, tile_size=64)
    saved = [graph("SaveImage", images=images[0]) for images in (whole, tiled)]
    components = graph("GetVideoComponents", video=graph("LoadVideo", file="clip.mp4")[0])
    frames = graph("ImageFromBatch", image=components[0], batch_index=0, length=FRAMES)
    latent = graph("VAEEncode", pixels=frames[0], vae=graph.vae)
    stock = graph("SaveLatent", samples=latent[0])
    tuned = graph.tune(latent=latent[0], steps=2)
    sampled = graph("SaveLatent", samples=graph.sample(tuned[0], graph.invert(tuned[0], latent=latent[0])[0])[0])
    outputs = server.run(graph)
    ours, stock = latents(server, outputs, ours), latents(server, outputs, stock)
    assert (ours - stock).norm() < 0.05 * ours.norm()  # newer cores decode to floats, and so round less
    assert torch.isfinite(latents(server, outputs, sampled)).all()
    (whole, tiled) = (pictures(server, outputs, node) for node in saved)
    assert whole.shape == tiled.shape == (FRAMES, 128, 128, 3)
    # close only: the norms of the decoder see a tile each
    assert torch.corrcoef(torch.stack([whole.flatten(), tiled.flatten()]))[0, 1] > 0.9


def test_several_takes(server, graph):
    flipped = graph("ImageFlip", image=graph.video[0], flip_method="y-axis: horizontally")
    second = graph("VAEEncode", pixels=flipped[0], vae=graph.vae)[0]
    takes = graph("TAVTake", latent=second, positive=graph.edit)[0]
    third = graph("LatentFromBatch", samples=second, batch_index=0, length=2)[0]
    takes = graph("TAVTake", latent=third, positive=graph.said, takes=takes)[0]
    told = [graph("PreviewAny", source=graph.tune(steps=3, dtype="fp32", **more)[3]) for more in ({"takes": takes}, {})]
    outputs = server.run(graph)
    several, one = (json.loads(outputs[node.id]["text"][0])["losses"] for node in told)
    assert len(several) == len(one) == 3 and several != one


def test_a_long_clip_through_context_windows(server, info):
    graph = Graph(info).source(frames=8)
    windowed = graph("TAVContextWindows", model=graph.inflated, context_length=4, context_overlap=2)[0]
    tuned = graph.tune(model=windowed, steps=2)
    graph("TAVSaveTunedWeights", tuned_weights=tuned[1], name="window", prompt=SOURCE)
    noise = graph.invert(tuned[0])
    ours = graph("SaveLatent", samples=graph.sample(tuned[0], noise[0])[0])
    stock = graph(
        "SaveLatent",
        samples=graph(
            "KSamplerAdvanced",
            model=tuned[0],
            add_noise="disable",
            steps=STEPS,
            cfg=5.0,
            sampler_name="euler",
            scheduler="ddim_uniform",
            positive=graph.edit,
            negative=graph.empty,
            latent_image=noise[0],
        )[0],
    )
    outputs = server.run(graph)
    expected = latents(server, outputs, ours)
    assert expected.shape == (8, 4, SIZE // 8, SIZE // 8) and expected.std() > 0.1
    assert (latents(server, outputs, stock) - expected).abs().max() < 1e-4


def test_what_clips_of_a_folder_save_has_names_of_its_own():
    saved = {"1": {"class_type": "TAVSaveTunedWeights", "inputs": {"name": "mine", "prompt": SOURCE}},
             "2": {"class_type": "TAVSaveInvertedNoise", "inputs": {"name": ["1", 0]}},
             "3": {"class_type": "LoadImage", "inputs": {"name": "a"}}}  # fmt: skip
    graph = queue_folder.graph_for(saved, "a.mp4", "a", {"1.prompt": EDIT})
    assert [node["inputs"]["name"] for node in graph.values()] == ["mine-a", ["1", 0], "a"]
    assert graph["1"]["inputs"]["prompt"] == EDIT and saved["1"]["inputs"]["name"] == "mine"


def test_a_clip_that_is_taken_out_of_the_queue_is_not_waited_for(server, info):
    graph = Graph(info)
    graph("SaveImage", images=graph("TAVLoadVideo", file="clip.mp4", count=2, width=32, height=32)[0])
    busy = Graph(info).source()
    busy("PreviewAny", source=busy.tune(steps=1000, seed=9)[3])
    running, taken = server.queue(busy), server.queue(graph)
    server.until(lambda message: message["type"] == "progress")  # one that hasn't begun can't be interrupted
    server.post("/queue", {"delete": [taken]})
    assert queue_folder.result(server.url, taken) == "failed: it was taken out of the queue"
    server.interrupt()
    assert queue_folder.result(server.url, running) == "failed: it was cancelled"


def test_a_graph_is_queued_for_every_clip_of_a_folder(server, info, tmp_path):
    graph = Graph(info)
    video = graph("TAVLoadVideo", file="clip.mp4", count=2, width=32, height=32)
    graph("SaveImage", images=video[0], filename_prefix="queued")
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    clips = tmp_path / "clips"
    clips.mkdir()
    whole = (server.home / "input" / "clip.mp4").read_bytes()
    for name, content in (("one.mp4", whole), ("two.mp4", whole[:300]), ("three.mp4", whole)):
        (clips / name).write_bytes(content)
    (tmp_path / "told.csv").write_text("clip,1.count\nthree.mp4,1\n")
    script = [sys.executable, str(ROOT / "workflows" / "queue_folder.py"), str(tmp_path / "graph.json"), str(clips)]
    done = subprocess.run([*script, "--server", server.url, "--sentences", str(tmp_path / "told.csv")],
                          capture_output=True, text=True, timeout=100)  # fmt: skip
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert done.returncode == 1 and len(lines) == 3, done.stderr
    assert lines["one.mp4"] == "queued-one_00001_.png, queued-one_00002_.png"
    assert lines["three.mp4"] == "queued-three_00001_.png"
    assert lines["two.mp4"].startswith(("failed: ", "refused: ")) and "two.mp4" in lines["two.mp4"]
