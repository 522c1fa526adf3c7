"""The page of the frontend, as the tests drive it."""

import json

from playwright.sync_api import Browser, Page

from support import ROOT

READY = "() => !!(window.app?.canvas && LiteGraph.registered_node_types.TAVOneShotTune)"
# settings of a graph for a run that ends soon
FEW = {"TAVOneShotTune": {"steps": 2, "preview_every": 2}, "TAVDDIMInversion": {"steps": 2},
       "TAVVideoSampler": {"steps": 2}, "KSamplerAdvanced": {"steps": 2}, "KSampler": {"steps": 2}}  # fmt: skip


def saved(name: str) -> dict:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text())


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
