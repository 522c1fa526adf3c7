"""A graph that is written down node by node, in the format that ComfyUI's frontend saves and the one that it queues."""

import copy
import uuid
from dataclasses import dataclass, field
from typing import Any

from workflows.wires import ROW, TITLE, aisles, columns, ways

# of the frontend: title bar and body of a node, frame of a group
COLOURS = {
    "green": ("#232", "#353", "#8A8"), "red": ("#322", "#533", "#A88"), "blue": ("#223", "#335", "#88A"),
    "cyan": ("#233", "#355", "#8AA"), "purple": ("#323", "#535", "#a1309b"), "yellow": ("#432", "#653", "#b58b2a"),
    "pale_blue": ("#2a363b", "#3f5159", "#3f789e"),
}  # fmt: skip
BUTTON = "IMAGEUPLOAD"  # the frontend adds it where a file can be uploaded
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", BUTTON}
WIDGET, TEXT, GAP, HEADING = 24, 52, 24, 44
# room for what a node shows below its widgets: a picture, a video, progress; as much as the renderer that takes the
# most
SHOWS = {"PreviewImage": 220, "SaveImage": 220, "PreviewAny": 110, "SaveVideo": 270, "TAVLoadVideo": 300,
         "TAVOneShotTune": 380, "TAVDDIMInversion": 375,
         "TAVVideoSampler": 300, "KSampler": 300, "KSamplerAdvanced": 300}  # fmt: skip
# below the others, since rows of "Nodes 2.0" are higher than those of the classic renderer, and for a widget that a
# core adds
SPARE = 60


class Spec:
    """An input of a node, as /object_info tells it."""

    def __init__(self, name: str, optional: bool, kind: str | list, options: dict | None = None):
        self.name, self.optional, self.options = name, optional, options or {}
        self.type = "COMBO" if isinstance(kind, list) else kind
        choices = kind if isinstance(kind, list) else self.options.get("options", [])
        self.default = self.options.get("default", choices[0] if choices else "")
        self.is_widget = self.type in WIDGETS and not self.options.get("forceInput")
        seed = self.options.get("control_after_generate", name in ("seed", "noise_seed"))
        self.extra_values = ["fixed"] if seed else []  # the widget that changes the seed after a run

    def socket(self) -> dict:
        socket = {"localized_name": self.name, "name": self.name, "type": self.type, "link": None}
        widget = {"widget": {"name": self.name}} if self.is_widget else {}
        return socket | ({"shape": 7} if self.optional else {}) | widget


@dataclass
class Node:
    id: int
    kind: str
    data: dict[str, Any]
    outputs: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)  # by input: a value, or [id, output] of another node

    def __getattr__(self, name: str) -> tuple["Node", int]:
        """An output by its name, to connect it."""
        return self, self.outputs.index(name)


class Workflow:
    """A graph that grows from left to right, a group a column. Nodes stand in their group from top to bottom."""

    def __init__(self, definitions: dict[str, dict]):
        self.definitions = definitions
        self.nodes: list[Node] = []
        self.links: list[list] = []
        self.groups: list[dict] = []
        self.x, self.y, self.width = 0, 0, 0

    def group(self, title: str, colour: str, width: int = 320, below: bool = False):
        """Begins a group: the nodes that follow are in it."""
        if not below:
            self.x, self.y = self.x + self.width + GAP if self.groups else 0, 0
            self.width = width + 2 * GAP
        self.y += GAP if below else 0
        self.groups.append(
            {
                "id": len(self.groups) + 1,
                "title": title,
                "color": COLOURS[colour][2],
                "font_size": 24,
                "flags": {},
                "bounding": [self.x, self.y, self.width, HEADING],
            }
        )
        self.y += HEADING

    def note(self, text: str, height: int) -> Node:
        node = self._place("MarkdownNote", height, "yellow")
        node.data.update(title="Note", widgets_values=[text], inputs=[], outputs=[], properties={})
        return node

    def add(self, kind: str, *, title: str | None = None, colour: str | None = None, **settings) -> Node:
        """A node.

        Each setting is the value of a widget, or an output of another node; the rest has its default.
        """
        definition = self.definitions[kind]
        specs = {
            name: Spec(name, part == "optional", *spec)
            for part in ("required", "optional")
            for name, spec in definition["input"].get(part, {}).items()
        }
        if any(spec.options.get("video_upload") for spec in specs.values()):
            specs["upload"] = Spec("upload", False, BUTTON, {"default": "image"})
        assert settings.keys() <= specs.keys(), f"{kind} has no {settings.keys() - specs.keys()}"
        widgets = [spec for spec in specs.values() if spec.is_widget]
        sockets = [spec for spec in specs.values() if not spec.is_widget]
        given = {spec.name: spec.default for spec in widgets} | settings
        values = []
        for spec in widgets:
            linked = isinstance(given[spec.name], Node | tuple)
            values += [spec.default if linked else given[spec.name], *spec.extra_values]

        texts = sum(spec.options.get("multiline", False) for spec in widgets)
        rows = max(len(sockets), len(definition["output"]))
        height = rows * ROW + len(values) * WIDGET + texts * TEXT + 16 + SHOWS.get(kind, 0)
        node = self._place(kind, height, colour)
        node.outputs = list(definition["output_name"])
        node.data["inputs"] = [spec.socket() for spec in sockets + widgets]
        node.data["outputs"] = [
            {"localized_name": name, "name": name, "type": type_, "links": []}
            for name, type_ in zip(definition["output_name"], definition["output"])
        ]
        node.data["properties"] = {"Node name for S&R": kind}
        node.data["widgets_values"] = values
        if title:
            node.data["title"] = title
        for slot, spec in enumerate(sockets + widgets):
            value = given.get(spec.name)
            if isinstance(value, Node | tuple):
                source, output = value if isinstance(value, tuple) else (value, 0)
                self._connect(source, output, node, slot)
                value = [str(source.id), output]
            if value is not None and spec.type != BUTTON:
                node.settings[spec.name] = value
        return node

    def _place(self, kind: str, height: int, colour: str | None) -> Node:
        node = Node(len(self.nodes) + 1, kind, {})
        position = [self.x + GAP, self.y + TITLE]
        node.data = {"id": node.id, "type": kind, "pos": position, "size": [self.width - 2 * GAP, height], "flags": {},
                     "order": node.id - 1, "mode": 0}  # fmt: skip
        if colour:
            node.data["color"], node.data["bgcolor"] = COLOURS[colour][:2]
        self.nodes.append(node)
        self.y = position[1] + height + GAP + (0 if kind in SHOWS or kind == "MarkdownNote" else SPARE)
        left, top, width, _ = self.groups[-1]["bounding"]
        self.groups[-1]["bounding"] = [left, top, width, self.y - top]
        return node

    def _connect(self, source: Node, slot: int, target: Node, index: int):
        link = len(self.links) + 1
        output, entry = source.data["outputs"][slot], target.data["inputs"][index]
        self.links.append([link, source.id, slot, target.id, index, output["type"]])
        output["links"].append(link)
        entry["link"] = link

    def make_room(self):
        """Moves the columns apart, as far as their wires need it."""
        nodes = [node.data for node in self.nodes]
        room, column = aisles(nodes, self.links), columns(nodes)
        places = [(node["pos"], column[node["id"]]) for node in nodes]
        at = {node["pos"][0] - GAP: column[node["id"]] for node in nodes}
        places += [(group["bounding"], at[group["bounding"][0]]) for group in self.groups]
        for place, number in places:
            place[0] += sum(room[left] for left in range(number + 1))

    def json(self, name: str) -> dict:
        """What the frontend would save."""
        self.make_room()
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": [node.data for node in self.nodes],
            "links": self.links,
            "groups": self.groups,
            "config": {},
            "extra": {"frontendVersion": "1.32.9"} | ways([node.data for node in self.nodes], self.links, 0),
            "version": 0.4,
        }

    def prompt(self) -> dict:
        """What the frontend would queue."""
        return {
            str(node.id): {"class_type": node.kind, "inputs": copy.deepcopy(node.settings)}
            for node in self.nodes
            if node.kind in self.definitions
        }
