"""Every workflow in a real browser: how it is laid out, and what comes out of it."""

import json
import sys
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from support import ROOT
from support.browser import FEW, is_newer, saved, visit
from support.comfyui_server import Refused
from tav_core import load_video
from tav_core.mini.demo import CLIP
from workflows import build, wires
from workflows.blueprint import DESCRIPTION, NAME
from workflows.build import WORKFLOWS
from workflows.graph import SHOWS
from workflows.parts import DEMO

FIRST, SAVES, LOADS = "01-one-shot-edit-mini", "02-four-edits-mini", "04-reuse-tuned-weights-mini"
MINI = {  # workflow -> columns, rows and size of the tiles of its video
    FIRST: (2, 1, 128), SAVES: (3, 2, 128), LOADS: (2, 1, 128), "11-regions-mini": (2, 2, 128),
    "13-controlnet-mini": (2, 2, 128), "14-lora-mini": (3, 1, 128), "15-travel-mini": (2, 1, 128),
    "21-long-clip-mini": (2, 1, 128), "22-two-takes-mini": (2, 1, 128), "31-stock-sampler-mini": (2, 1, 128),
    "32-sweep-mini": (3, 2, 128), "33-metrics-mini": (2, 1, 128), "41-upscale-mini": (2, 1, 256),
    "42-back-to-source-mini": (2, 1, 256),
}  # fmt: skip
BATCH = "23-batch-mini"  # whose names of files come over a wire, one for each clip


@pytest.fixture(scope="module")
def results(page, server):
    """The videos of a mini workflow by the names of their files, converted by the frontend, executed with few steps."""
    videos = {}

    def run(name: str):
        if name == LOADS:
            run(SAVES)
        if name not in videos:
            prompt = page.evaluate(
                "async graph => { await app.loadGraphData(graph); return (await app.graphToPrompt()).output }",
                saved(name),
            )
            for node in prompt.values():
                node["inputs"].update(FEW.get(node["class_type"], {}))
            saves = [id_ for id_, node in prompt.items() if node["class_type"] == "SaveVideo"]
            shown = server.run(prompt)
            files = {prompt[save]["inputs"]["filename_prefix"]: shown[save]["images"][0] for save in saves}
            videos[name] = {prefix: load_video(server.file(file)) for prefix, file in files.items()}
        return videos[name]

    return run


def test_files_are_those_of_the_script(server, monkeypatch, tmp_path):
    if is_newer(server):
        pytest.skip("they are written from the nodes of the oldest core, some of which have other widgets here")
    folders = {name: tmp_path / name for name in ("workflows", "subgraphs")}
    for folder in folders.values():
        folder.mkdir()
    paths = map(str, folders.values())
    monkeypatch.setattr(sys, "argv", ["build.py", server.url, "--output", next(paths), "--subgraphs", next(paths)])
    build.main()
    for name, folder in folders.items():
        assert {path.name for path in folder.iterdir()} == {path.name for path in (ROOT / name).glob("*.json")}
        for path in folder.iterdir():
            assert path.read_bytes() == (ROOT / name / path.name).read_bytes(), f"{path.name}: run workflows/build.py"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_opens_as_it_was_saved(page, server, name):
    """No missing node, no red link, no widget or link that the frontend changes, nothing on top of another."""
    workflow = saved(name)
    graph = page.evaluate(
        """async workflow => {
            await app.loadGraphData(workflow)
            await new Promise(done => setTimeout(done, 500))  // DOM widgets find their place
            const slot = (id, side, i) => app.graph.getNodeById(id)[side][i].type
            return {
                nodes: app.graph.nodes.map(node =>
                    ({...node.serialize(), box: [...node.boundingRect], missing: node.has_errors})),
                links: [...app.graph.links.values()].map(link => [link.id, Number(link.origin_id), link.origin_slot,
                    Number(link.target_id), link.target_slot, link.type,  // newer: text
                    slot(link.origin_id, 'outputs', link.origin_slot),
                    slot(link.target_id, 'inputs', link.target_slot)]),
                groups: app.graph.groups.map(group => [...group.boundingRect]),
                types: Object.keys(LiteGraph.registered_node_types),
            }
        }""",
        workflow,
    )
    assert {node["type"] for node in workflow["nodes"]} <= set(graph["types"])
    if not is_newer(server):  # newer ones also mark a node whose file isn't there yet
        assert not any(node["missing"] for node in graph["nodes"])
    expect(page.get_by_text("Missing Node Types")).to_have_count(0)
    assert sorted(link[:6] for link in graph["links"]) == workflow["links"]
    assert all(made == given and taken in (given, "*") for *_, made, given, taken in graph["links"])
    for node, opened in zip(workflow["nodes"], graph["nodes"]):
        if is_newer(server) and not node["type"].startswith("TAV"):
            continue  # of the core, and with other widgets than in the oldest
        assert (
            node["widgets_values"] == opened["widgets_values"]
            if "widgets_values" in opened
            else not node["widgets_values"]
        )
        assert [slot["name"] for slot in node["inputs"]] == [slot["name"] for slot in opened["inputs"]]
        assert node["size"] == pytest.approx(opened["size"], abs=2), f"{node['type']} wants another size"
    for (ax, ay, aw, ah), (bx, by, bw, bh) in combinations([node["box"] for node in graph["nodes"]], 2):
        assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
    for x, y, w, h in (node["box"] for node in graph["nodes"]):
        assert (
            sum(gx <= x and gy <= y and x + w <= gx + gw and y + h <= gy + gh for gx, gy, gw, gh in graph["groups"])
            == 1
        )


@pytest.mark.parametrize("name", WORKFLOWS)
def test_wires_can_be_followed(page, name):
    """Each goes from stop to stop level above all nodes, between two of them, or steeply between two columns."""
    workflow = saved(name)
    links, stops = page.evaluate(
        """async workflow => {
            await app.loadGraphData(workflow)
            const links = [...app.graph.links.values()], slot = (id, i, input) =>
                [...(app.graph.getNodeById(id)[input ? 'getInputPos' : 'getOutputPos'](i))]
            const way = id => { const stop = app.graph.reroutes.get(id)
                return stop ? [...way(stop.parentId), [...stop.pos]] : [] }
            return [links.map(link => [Number(link.origin_id), Number(link.target_id),
                [slot(link.origin_id, link.origin_slot, false), ...way(link.parentId),
                 slot(link.target_id, link.target_slot, true)]]), app.graph.reroutes.size]
        }""",
        workflow,
    )
    assert stops == len(workflow["extra"]["reroutes"]) and len(links) == len(workflow["links"])
    inset = 15  # of a slot in its node
    boxes = {node["id"]: (*node["pos"], *node["size"]) for node in workflow["nodes"]}
    for source, target, way in links:
        for ((ax, ay), (bx, by)), (id_, (x, y, w, h)) in product(pairwise(way), boxes.items()):
            beside = max(ax, bx) <= x + inset or min(ax, bx) >= x + w - inset
            assert beside or max(ay, by) <= y - wires.TITLE or min(ay, by) >= y + h or id_ in (source, target), (
                f"a wire from {source} to {target} runs behind {id_}"
            )


@pytest.mark.parametrize("renderer", ["classic", "Nodes 2.0"])
def test_layout(browser, server, renderer):
    """No two boxes overlap and all lie in their group, also where each node without a picture has a widget more."""
    vue = renderer != "classic"
    if vue and not is_newer(server):
        pytest.skip("only newer frontends have it")
    server.post("/settings", {"Comfy.VueNodes.Enabled": vue})
    try:
        page = visit(browser, server)
        for name in WORKFLOWS:
            boxes, groups = page.evaluate(
                """async ([workflow, vue]) => {
                    await app.loadGraphData(workflow)
                    const element = node => document.querySelector(`[data-node-id="${node.id}"]`)
                    for (let i = 0; i < 100 && vue && !app.graph.nodes.every(element); i++)
                        await new Promise(done => setTimeout(done, 100))
                    await new Promise(done => setTimeout(done, vue ? 1500 : 500))  // DOM widgets find their place
                    const {scale, offset} = app.canvas.ds, canvas = app.canvas.canvas.getBoundingClientRect()
                    return [app.graph.nodes.map(node => {
                        if (!vue) return [node.type, ...node.boundingRect]
                        const box = element(node).getBoundingClientRect()
                        return [node.type, (box.x - canvas.x) / scale - offset[0],
                                (box.y - canvas.y) / scale - offset[1],
                            box.width / scale, box.height / scale]
                    }), app.graph.groups.map(group => [...group.boundingRect])]
                }""",
                [saved(name), vue],
            )
            boxes = [
                (kind, x, y, x + w, y + h + (0 if kind in SHOWS or kind == "MarkdownNote" else 30))
                for kind, x, y, w, h in boxes
            ]
            for (a, left, top, right, bottom), (b, x, y, end, low) in combinations(boxes, 2):
                assert right <= x or end <= left or bottom <= y or low <= top, f"{name}: {a} and {b} overlap"
            for kind, left, top, right, bottom in boxes:
                around = [
                    x - 1 <= left and y <= top and right <= x + w + 1 and bottom <= y + h for x, y, w, h in groups
                ]
                assert sum(around) == 1, f"{name}: {kind} is in {sum(around)} groups"
    finally:
        server.post("/settings", {"Comfy.VueNodes.Enabled": False})


def test_thumbnails_differ():
    """Squares, as the cards of the template browser are."""
    pictures = {name: Image.open(ROOT / "workflows" / f"{name}.jpg") for name in WORKFLOWS}
    assert {(picture.format, picture.size) for picture in pictures.values()} == {("JPEG", (480, 480))}
    small = {
        name: np.asarray(picture.convert("RGB").resize((32, 32))).astype(float) for name, picture in pictures.items()
    }
    for a, b in combinations(WORKFLOWS, 2):
        assert np.abs(small[a] - small[b]).mean() > 10, (a, b)


@pytest.mark.parametrize("name", MINI)
def test_result(results, name):
    videos = {key: clip.frames.float() for key, clip in results(name).items()}
    video = videos.pop(f"video/{name}")
    columns, rows, size = MINI[name]
    f, h, w, _ = video.shape
    assert f == 8 and w == columns * (size + 8)
    tall, wide = h // rows, w // columns
    tiles = [
        video[:, y + tall - 4 - size : y + tall - 4, x + 4 : x + 4 + size]
        for y in range(0, h, tall)
        for x in range(0, w, wide)
    ]
    source, *edits = tiles[:5]
    for edit in edits:
        assert edit.std() > 20, "black, or of one colour"
        assert (edit - source).abs().mean() > 2, "not edited"
        assert edit.diff(dim=0).abs().mean() > 0.5, "stands still"
    assert videos, "no edit is saved alone"
    for alone in videos.values():
        assert alone.shape == (8, size, size, 3)
        assert min((alone - tile).abs().mean() for tile in tiles) < 8, "none of those that are compared"


def test_each_clip_of_a_folder_is_edited(page, server):
    """Under its own name, by its own sentences."""
    prompt = page.evaluate(
        "async graph => { await app.loadGraphData(graph); return (await app.graphToPrompt()).output }", saved(BATCH)
    )
    for node in prompt.values():
        node["inputs"].update(FEW.get(node["class_type"], {}))
    shown = server.run(prompt)
    saves = [id_ for id_, node in prompt.items() if node["class_type"] == "SaveVideo"]
    files = [server.file(file) for save in saves for file in shown[save]["images"]]
    names = [f"{BATCH}{kind}-{clip}_0000" for kind in ("", "-edit") for clip in ("bouncing", "circling")]
    assert [path.name[: len(name)] for path, name in zip(files, names, strict=True)] == names
    *_, one, other = (load_video(file).frames.float() for file in files)
    assert one.shape == other.shape == (8, 128, 128, 3) and (one - other).abs().mean() > 10


@pytest.mark.parametrize("name", [name for name in WORKFLOWS if name.endswith("sd15")])
def test_a_large_checkpoint_is_all_that_is_missing(page, server, name):
    """Of workflows that can't run here: the server finds nothing else to refuse."""
    prompt = page.evaluate(
        "async graph => { await app.loadGraphData(graph); return (await app.graphToPrompt()).output }", saved(name)
    )
    for node in prompt.values():
        if node["class_type"] == "TAVLoadVideo":
            node["inputs"]["file"] = "clip.mp4"
    with pytest.raises(Refused) as error:
        server.queue(prompt)
    wrong = {
        (node["class_type"], each["extra_info"]["input_name"])
        for node in json.loads(error.value.details)["node_errors"].values()
        for each in node["errors"]
    }
    assert ("CheckpointLoaderSimple", "ckpt_name") in wrong
    assert wrong <= {("CheckpointLoaderSimple", "ckpt_name"), ("TAVLoadTunedWeights", "file")}


def test_the_blueprint_is_found_and_edits_a_clip(page, server):
    """By the node search; as one node between the clip, the checkpoint and Save Video."""
    page.evaluate("() => app.loadGraphData({last_node_id: 0, last_link_id: 0, nodes: [], links: [], version: 0.4})")
    page.wait_for_timeout(1000)  # newer frontends take no double click before
    page.mouse.dblclick(1000, 700)
    page.wait_for_function("() => document.activeElement.tagName == 'INPUT'")
    page.keyboard.type("one-shot video")
    expect(page.get_by_text(DESCRIPTION).last).to_be_visible()  # beside the list
    page.keyboard.press("Enter")
    page.wait_for_function("name => app.graph.nodes[0]?.title == name", arg=NAME)
    prompt = page.evaluate(
        """async demo => {
            const add = (kind, values) => {
                const node = LiteGraph.createNode(kind)
                app.graph.add(node)
                for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name]
                return node
            }
            const [edit] = app.graph.nodes, to = name => edit.inputs.findIndex(input => input.name == name)
            const clip = add('TAVLoadVideo', {file: demo, count: 8, width: 128, height: 128})
            const checkpoint = add('TAVLoadCheckpoint', {})
            for (const [i, name] of [[0, 'images'], [1, 'fps'], [3, 'audio']]) clip.connect(i, edit, to(name))
            for (const [i, name] of ['model', 'clip', 'vae'].entries()) checkpoint.connect(i, edit, to(name))
            edit.connect(0, add('SaveVideo', {filename_prefix: 'video/blueprint'}), 0)
            const words = {'what the clip shows': 'a red ball', 'what it should show': 'a blue star', cfg: 5,
                'tuning steps': 2, 'sampling steps': 2}
            for (const widget of edit.widgets) if (widget.name in words) widget.value = words[widget.name]
            return (await app.graphToPrompt()).output
        }""",
        DEMO,
    )
    kinds = {node["class_type"]: node["inputs"] for node in prompt.values()}
    assert kinds["TAVOneShotTune"]["steps"] == kinds["TAVDDIMInversion"]["steps"] == 2
    assert kinds["TAVVideoSampler"]["steps"] == 2 and kinds["TAVVideoSampler"]["cfg"] == 5
    texts = [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode"]
    assert texts == ["a red ball", "a blue star", ""]
    shown = server.run(prompt)
    (save,) = (id_ for id_, node in prompt.items() if node["class_type"] == "SaveVideo")
    video, clip = load_video(server.file(shown[save]["images"][0])), load_video(CLIP)
    assert video.frames.shape == clip.frames.shape and video.fps == clip.fps
    assert (video.frames.float() - clip.frames.float()).abs().mean() > 2


def test_an_edit_alone_has_the_rate_of_the_clip(results):
    (source,) = (node for node in saved(FIRST)["nodes"] if node["type"] == "TAVLoadVideo")
    assert source["widgets_values"][0] == DEMO
    assert {clip.fps for clip in results(FIRST).values()} == {load_video(CLIP).fps}
