"""The pack in a real browser: the template browser, every workflow, a run with the mouse, the help pages.

`TAV_PICTURES=1` also makes the pictures of the README and of the help pages: with it the run has its full length.
"""

import json
import os
import re
import sys
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from support import ROOT
from support.browser_install import chromium
from support.comfyui_server import Refused
from tav_core import load_video
from tav_core.mini.demo import CLIP
from tav_core.project import Project
from workflows import build, wires
from workflows.blueprint import NAME
from workflows.build import WORKFLOWS
from workflows.graph import SHOWS
from workflows.parts import DEMO

DOCS = ROOT / "nodes" / "web" / "docs"
PICTURES = bool(os.environ.get("TAV_PICTURES"))
FIRST, SAVES, LOADS = "01-one-shot-edit-mini", "02-four-edits-mini", "04-reuse-tuned-weights-mini"
MINI = {  # workflow -> columns, rows and size of the tiles of its video
    FIRST: (2, 1, 128), SAVES: (3, 2, 128), LOADS: (2, 1, 128), "11-regions-mini": (2, 2, 128),
    "13-controlnet-mini": (2, 2, 128), "14-lora-mini": (3, 1, 128), "15-travel-mini": (2, 1, 128),
    "21-long-clip-mini": (2, 1, 128), "22-two-takes-mini": (2, 1, 128), "31-stock-sampler-mini": (2, 1, 128),
    "32-sweep-mini": (3, 2, 128), "33-metrics-mini": (2, 1, 128), "41-upscale-mini": (2, 1, 256),
    "42-back-to-source-mini": (2, 1, 256),
}  # fmt: skip
BATCH = "23-batch-mini"  # whose names of files come over a wire, one for each clip
FEW = {"TAVOneShotTune": {"steps": 2, "preview_every": 2}, "TAVDDIMInversion": {"steps": 2},
       "TAVVideoSampler": {"steps": 2}, "KSamplerAdvanced": {"steps": 2}, "KSampler": {"steps": 2}}  # fmt: skip
NODES = sorted(path.stem for path in DOCS.glob("*.md"))
FIT = """() => {  // the whole graph with the lanes of its wires
    const {ds} = app.canvas, stops = [...app.graph.reroutes.values()].map(stop => stop.pos)
    const groups = app.graph.groups.map(group => [...group.boundingRect])
    const left = Math.min(...groups.map(([x]) => x)), top = Math.min(...stops.map(([, y]) => y)) - 20
    const right = Math.max(...groups.map(([x, , w]) => x + w)), bottom = Math.max(...groups.map(([, y, , h]) => y + h))
    ds.scale = Math.min(2500 / (right - left), 1240 / (bottom - top))
    ds.offset = [70 / ds.scale - left, 70 / ds.scale - top]
    app.canvas.setDirty(true, true)
}"""
READY = "() => !!(window.app?.canvas && LiteGraph.registered_node_types.TAVOneShotTune)"


def saved(name: str) -> dict:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


def visit(browser: Browser, server, first: bool = False) -> Page:
    """The page of the frontend. Who opens it for the first time is shown the templates."""
    server.post("/settings", {"Comfy.TutorialCompleted": not first})
    page = browser.new_context(viewport={"width": 1920, "height": 1080}).new_page()
    page.add_init_script("localStorage.vueNodesBannerDismissed = true")  # an advertisement
    page.goto(server.url)
    page.wait_for_function(READY, timeout=120_000)
    return page


def is_newer(server) -> bool:
    """Than the oldest core: it shows a node's pictures again after a reload, and its frontend has two renderers."""
    return "has_intermediate_output" in server.get("/object_info/TAVOneShotTune")["TAVOneShotTune"]


@pytest.fixture(scope="module")
def page(browser, server):
    return visit(browser, server)


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


def test_first_workflow_with_the_mouse(browser, server):
    """A template and Run."""
    page = visit(browser, server, first=True)
    if is_newer(server):  # newer frontends keep those of extensions apart
        page.get_by_text("tune-a-video", exact=True).first.click()
    card = page.get_by_test_id(f"template-workflow-{FIRST}")
    card.scroll_into_view_if_needed()  # pictures are loaded when they come into sight
    expect(card.locator("img").first).to_have_js_property("complete", True)
    assert page.get_by_test_id(re.compile(r"^template-workflow-\d\d-")).count() == len(WORKFLOWS)
    if PICTURES:
        page.get_by_text("Newest").first.click()
        page.get_by_text("A → Z").first.click()
        card.scroll_into_view_if_needed()
        page.wait_for_timeout(3000)
        picture(page, ".github/comfyui-templates.jpg")
    card.click()
    page.wait_for_function("() => app.graph.nodes.some(node => node.type == 'TAVOneShotTune')")
    expect(page.get_by_text("Missing Node Types")).to_have_count(0)
    if not PICTURES:
        page.evaluate(
            """few => app.graph.nodes.forEach(node => Object.entries(few[node.type] ?? {}).forEach(([name, value]) => {
                node.widgets.find(widget => widget.name == name).value = value
            }))""",
            FEW,
        )
    page.locator(
        "button[data-testid=queue-button], [data-testid=queue-button] button"
    ).first.click()  # itself, or what holds it
    node = "app.graph.nodes.find(node => node.type == 'TAVOneShotTune')"
    page.wait_for_function(f"() => {node}.progress > 0", timeout=60_000)
    page.wait_for_function(
        f"() => /step \\d+.\\d+, loss 0\\.\\d+/.test({node}.widgets.find(w => w.name == '$$node-text-preview')?.value)"
    )
    page.wait_for_function(f"() => {node}.imgs?.[0]?.naturalWidth > 500", timeout=300_000)  # the preview: 8 frames
    video = page.locator(f"video[src*='{FIRST}_']")
    video.wait_for(timeout=500_000)
    page.wait_for_function("name => document.querySelector(`video[src*='${name}_']`).videoWidth == 272", arg=FIRST)
    page.wait_for_function(f"() => {node}.imgs?.[0]?.naturalHeight == 432")  # the loss curve, in place of the preview
    if PICTURES:
        page.evaluate(
            "() => app.extensionManager.setting.set('Comfy.Minimap.Visible', false)"
        )  # it lies on the last node
        page.set_viewport_size({"width": 2600, "height": 1340})  # below 0.6 nodes have no words
        page.wait_for_timeout(1000)
        page.evaluate(FIT)
        page.wait_for_timeout(3000)
        picture(page, ".github/comfyui-workflow.jpg")
    if is_newer(server):
        page.reload()
        page.wait_for_function(f"() => {READY[6:]} && {node} && !{node}.imgs?.length", timeout=120_000)
        page.evaluate("() => app.queuePrompt(0)")  # a cached run
        page.wait_for_function(f"() => {node}.imgs?.[0]?.naturalHeight == 432", timeout=60_000)


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


def test_the_blueprint_edits_a_clip(page, server):
    """As one node between the clip, the checkpoint and Save Video."""
    (entry,) = (id_ for id_, entry in server.get("/global_subgraphs").items() if entry["name"] == NAME)
    prompt = page.evaluate(
        """async ([graph, demo]) => {
            await app.loadGraphData(graph)
            await new Promise(done => setTimeout(done, 500))
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
        [json.loads(server.get(f"/global_subgraphs/{entry}")["data"]), DEMO],
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


@pytest.mark.parametrize("node", NODES)
def test_help(page, server, node):
    if PICTURES:
        draw_wiring(page, node)
    text = (DOCS / f"{node}.md").read_text()
    for file in [f"{node}.md", f"{node}/zh.md", *re.findall(r"!\[.*?\]\((.*?)\)", text)]:
        served = page.request.get(f"{server.url}/extensions/tune-a-video/docs/{file}")
        assert served.body() == (DOCS / file).read_bytes()
    (definition,) = server.get(f"/object_info/{node}").values()
    inputs = {name for part in ("required", "optional") for name in definition["input"].get(part, {})}
    inputs -= {f"images_{i}" for i in range(3, 6)}  # "images_2 to images_6"
    told = set(re.findall(r"\w+", text))
    assert inputs <= told and set(definition["output_name"]) <= told


def test_each_node_has_help(server):
    assert sorted(node for node in server.get("/object_info") if node.startswith("TAV")) == NODES


def open_help(page: Page, kind: str):
    page.evaluate("graph => app.loadGraphData(graph)", saved(FIRST))
    page.evaluate(
        """kind => {
            const node = app.graph.nodes.find(node => node.type == kind)
            app.canvas.selectNode(node)
            app.canvas.centerOnNode(node)
        }""",
        kind,
    )
    page.get_by_test_id("info-button").click()


def test_help_opens_in_the_page(page):
    open_help(page, "TAVInflate")
    shown = page.locator(".node-help-content")
    expect(shown.get_by_role("heading", name="Inflate")).to_be_visible()
    page.wait_for_function("() => document.querySelector('.node-help-content img')?.naturalWidth > 100")


def test_other_languages(browser, server):
    """Texts of `locales/`, and a help page, in Chinese with its picture too.

    Older frontends lose what a pack says in the languages that they know themselves; newer ones offer no German.
    """
    language = "zh" if is_newer(server) else "de"
    server.post("/settings", {"Comfy.Locale": language})
    try:
        page = visit(browser, server)
        shown = page.evaluate(
            """kinds => Object.fromEntries(kinds.map(kind => {
                const node = LiteGraph.createNode(kind), slots = [...node.inputs, ...(node.widgets ?? [])]
                return [kind, {
                    title: node.title, description: node.constructor.nodeData.description,
                    inputs: Object.fromEntries(slots.map(slot => [slot.name, slot.localized_name ?? slot.label])),
                    outputs: node.outputs.map(slot => slot.localized_name),
                }]
            }))""",
            NODES,
        )
        for kind, texts in json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text()).items():
            assert [texts["display_name"], texts["description"]] == [shown[kind]["title"], shown[kind]["description"]]
            names = {name: text["name"] for name, text in texts["inputs"].items()}
            assert names.items() <= shown[kind]["inputs"].items()
            for i, text in texts.get("outputs", {}).items():
                assert text.get("name") in (None, shown[kind]["outputs"][int(i)])
        open_help(page, "TAVInflate")
        heading = "膨胀" if language == "zh" else "Inflate"
        expect(page.locator(".node-help-content").get_by_role("heading", name=heading)).to_be_visible()
        page.wait_for_function("() => document.querySelector('.node-help-content img')?.naturalWidth > 100")
    finally:
        server.post("/settings", {"Comfy.Locale": "en"})


# ------------------------------------------------------------------------------------------------- pictures


def picture(page: Page, path: str, **options):
    page.screenshot(path=ROOT / path, type="jpeg", quality=82, **options)


def wiring(kind: str) -> dict:
    """A node of that kind with what it is connected to, left and right of it."""
    name = next(name for name in WORKFLOWS if any(node["type"] == kind for node in saved(name)["nodes"]))
    workflow = saved(name)
    (node, *_) = (node for node in workflow["nodes"] if node["type"] == kind)
    links = [link for link in workflow["links"] if node["id"] in (link[1], link[3])]
    left, right = ({link[i]: None for link in links} for i in (1, 3))
    nodes = []
    for other in workflow["nodes"]:
        column = [key for key in (left if other["id"] in left else right) if key != node["id"]]
        if other is node:
            other["pos"], other["size"][1] = [0, 0], 0
        elif other["id"] in left or other["id"] in right:
            x = -300 if other["id"] in left else node["size"][0] + 80
            other["pos"], other["flags"] = [x, 70 * column.index(other["id"])], {"collapsed": True}
        else:
            continue
        for slot in other["inputs"]:
            slot["link"] = slot["link"] if slot["link"] in [link[0] for link in links] else None
        for slot in other["outputs"]:
            slot["links"] = [link[0] for link in links if link[0] in slot["links"]]
        nodes.append(other)
    return workflow | {"nodes": nodes, "links": links, "groups": [], "extra": {}}


def draw_wiring(page: Page, kind: str):
    graph = wiring(kind)
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(1500)  # the frontend brings the graph into view
    height = page.evaluate(
        """kind => {
            app.canvas.ds.scale = 1
            app.canvas.ds.offset = [700, 300]
            const node = app.graph.nodes.find(node => node.type == kind)
            node.setSize([node.size[0], node.computeSize()[1]])
            app.canvas.setDirty(true, true)
            return node.size[1]
        }""",
        kind,
    )
    page.wait_for_timeout(1000)
    height = max(height, *(node["pos"][1] for node in graph["nodes"]))
    picture(page, f"nodes/web/docs/{kind}.jpg", clip={"x": 370, "y": 240, "width": 1020, "height": height + 80})


def test_the_page_of_a_project_opens_from_disk(browser, tmp_path):
    """Its videos play, what is told of them is text, and nothing comes from elsewhere."""
    shown = "a <b>ball</b> & '100%'"
    facts = {"prompt": shown, "checkpoint": "tiny", "frames": 4, "fps": 8.0, "size": [64, 64]}
    project, video = Project(tmp_path / "50% #1?", {"edits": []}), torch.randint(256, (4, 64, 64, 3), dtype=torch.uint8)
    project.summary |= facts
    project.put("source", video, 8.0, None)
    for scale in (2.0, 5.0):
        settings = {"prompt": shown, "region": "everything", "fps": 8.0, "seed": None, "attention_injection": 0.5}
        project.add({**settings, "guidance_scale": scale}, 255 - video, None, None)
    project.show_grid(project.edits, 8.0)
    project.show(8.0, None)
    page, asked = browser.new_context().new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((project.folder / "index.html").as_uri())
    page.wait_for_function("() => [...document.querySelectorAll('video')].every(video => video.readyState >= 2)")
    assert page.locator("video").count() == 5  # source, two edits, their grid, all of them
    assert page.locator("img").evaluate_all("all => all.map(image => image.naturalWidth > 0)") == [True]
    assert page.locator("h1").inner_text() == shown and page.locator("b").count() == 0
    expect(page.locator("figcaption").nth(1)).to_have_text(f"1. guidance scale 2: {shown}")
    folder = project.folder.as_uri()
    assert len({url.rsplit("/", 1)[1] for url in asked}) == 7 and all(url.startswith(folder) for url in asked)
