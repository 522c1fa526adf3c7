"""The subgraph blueprint: the whole method as one node, which ComfyUI lists among its nodes."""

import uuid

from workflows.graph import GAP, Node, Workflow
from workflows.parts import TUNING, sentence
from workflows.wires import ways

NAME = "One-shot video edit"
INPUT, OUTPUT = -10, -20  # ids of the nodes in a subgraph that stand for its own inputs and outputs
DESCRIPTION = (
    "Tunes a Stable Diffusion checkpoint on one clip, inverts the clip, and draws what the second sentence says with "
    "the motion of the clip (Tune-A-Video)."
)
Slot = tuple[str, str, list[tuple[Node, str]]]  # of an input: its name, its type, and the inner inputs that it feeds


def inner(w: Workflow) -> tuple[list[Slot], list[tuple[str, Node]]]:
    """Places the nodes. Returns the inputs of the subgraph, and its outputs by name."""
    w.group("Prepare", "blue")
    inflated = w.add("TAVInflate")
    latent = w.add("VAEEncode")
    texts = {"What the clip shows": "a man is skiing", "What it should show": "spider man is skiing", "Nothing": ""}
    words = [sentence(w, None, title, text) for title, text in texts.items()]
    described, edit, empty = words
    w.group("Tune", "purple", 380)
    given = dict(model=inflated, latent=latent, positive=described, preview_prompt=edit)
    tuned = w.add("TAVOneShotTune", **given, **TUNING[False])
    w.group("Invert", "cyan")
    noise = w.add("TAVDDIMInversion", model=tuned.MODEL, latent=latent, conditioning=described, measure=False)
    w.group("Edit", "cyan")
    led = w.add("TAVAttentionInjection", model=tuned.MODEL, conditioning=described)
    walk = dict(noise=noise.noise, sigmas=noise.sigmas)
    sample = w.add("TAVVideoSampler", model=led, positive=edit, negative=empty, **walk)
    frames = w.add("VAEDecode", samples=sample)
    video = w.add("CreateVideo", images=frames)
    inputs = [
        ("images", "IMAGE", [(latent, "pixels")]),
        ("fps", "FLOAT", [(video, "fps")]),
        ("audio", "AUDIO", [(video, "audio")]),
        ("model", "MODEL", [(inflated, "model")]),
        ("clip", "CLIP", [(each, "clip") for each in words]),
        ("vae", "VAE", [(latent, "vae"), (tuned, "vae"), (frames, "vae")]),
        ("what the clip shows", "STRING", [(described, "text")]),
        ("what it should show", "STRING", [(edit, "text")]),
        ("tuning steps", "INT", [(tuned, "steps")]),
        ("learning rate", "FLOAT", [(tuned, "learning_rate")]),
        ("sampling steps", "INT", [(noise, "steps"), (sample, "steps")]),
        ("cfg", "FLOAT", [(sample, "cfg")]),
        ("attention injection", "FLOAT", [(led, "share")]),
    ]
    return inputs, [("video", video), ("images", frames)]


def blueprint(definitions: dict[str, dict]) -> dict:
    """The file of the blueprint: a workflow of one node, and the subgraph that it stands for."""
    w = Workflow(definitions)
    inputs, outputs = inner(w)
    w.make_room()
    nodes, own = [node.data for node in w.nodes], len(w.links)
    way = ways(nodes, w.links, 0)
    slots = {"inputs": [], "outputs": []}
    for index, (name, kind, targets) in enumerate(inputs):
        first = len(w.links) + 1
        for node, entry in targets:
            at = [slot["name"] for slot in node.data["inputs"]].index(entry)
            w.links.append([len(w.links) + 1, INPUT, index, node.id, at, kind])
            node.data["inputs"][at]["link"] = len(w.links)
        slots["inputs"].append({"name": name, "type": kind, "linkIds": list(range(first, len(w.links) + 1))})
    for index, (name, node) in enumerate(outputs):
        kind = node.data["outputs"][0]["type"]
        w.links.append([len(w.links) + 1, node.id, 0, OUTPUT, index, kind])
        node.data["outputs"][0]["links"].append(len(w.links))
        slots["outputs"].append({"name": name, "type": kind, "linkIds": [len(w.links)]})
    for side, told in slots.items():
        for slot in told:
            slot["id"] = identity(f"{side} {slot['name']}")
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    subgraph = {
        "id": identity("subgraph"), "version": 1, "revision": 0, "config": {}, "name": NAME,
        "description": DESCRIPTION, "category": "Tune-A-Video",
        "state": {"lastGroupId": len(w.groups), "lastNodeId": len(nodes), "lastLinkId": len(w.links),
                  "lastRerouteId": len(way["reroutes"])},
        "inputNode": {"id": INPUT, "bounding": [-320, 0, 180, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUT, "bounding": [right + 6 * GAP, 0, 120, 40 + 20 * len(outputs)]},
        **slots, "widgets": [], "nodes": nodes, "groups": w.groups,
        "links": [linked(link, way["linkExtensions"]) for link in w.links],
        "reroutes": way["reroutes"], "extra": {},
    }  # fmt: skip
    assert all(link[0] <= own or INPUT in link or OUTPUT in link for link in w.links)
    return {
        "id": identity("workflow"), "revision": 0, "last_node_id": len(nodes) + 1, "last_link_id": 0,
        "nodes": [outer(inputs, slots, len(nodes) + 1, subgraph["id"])], "links": [], "groups": [],
        "definitions": {"subgraphs": [subgraph]}, "config": {},
        "extra": {"frontendVersion": "1.32.9", "BlueprintDescription": DESCRIPTION}, "version": 0.4,
    }  # fmt: skip


def identity(of: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{NAME} {of}"))


def linked(link: list, extensions: list[dict]) -> dict:
    """A link as a subgraph has it."""
    fields = dict(zip(("id", "origin_id", "origin_slot", "target_id", "target_slot", "type"), link))
    stops = {each["id"]: {"parentId": each["parentId"]} for each in extensions}
    return fields | stops.get(link[0], {})


def outer(inputs: list[Slot], slots: dict, number: int, kind: str) -> dict:
    """The node that stands for the subgraph; what feeds a widget has that widget."""
    sockets = []
    for name, type_, ((node, entry), *_) in inputs:
        (slot,) = (slot for slot in node.data["inputs"] if slot["name"] == entry)
        sockets.append({"name": name, "type": type_, "link": None})
        if "widget" in slot:
            sockets[-1]["widget"] = {"name": name}
    return {
        "id": number, "type": kind, "pos": [0, 0], "size": [400, 460], "flags": {}, "order": 0, "mode": 0,
        "title": NAME, "inputs": sockets, "properties": {}, "widgets_values": [],
        "outputs": [{"name": slot["name"], "type": slot["type"], "links": []} for slot in slots["outputs"]],
    }  # fmt: skip
