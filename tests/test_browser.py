"""The pack in a real browser: the template browser, a run with the mouse, the help pages, the page of a project.

`TAV_PICTURES=1` also makes the pictures of the README and of the help pages: with it the run has its full length.
"""

import json
import os
import re

import pytest
import torch
from playwright.sync_api import Page, expect

from support import ROOT
from support.browser import FEW, READY, is_newer, saved, visit
from tav_core.project import Project
from workflows.build import WORKFLOWS

FIRST = "01-one-shot-edit-mini"
DOCS = ROOT / "nodes" / "web" / "docs"
PICTURES = bool(os.environ.get("TAV_PICTURES"))
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
