"""The ways of wires, as stops that the frontend calls reroutes: no wire runs behind a node that it doesn't belong to.

A wire to the next column is drawn as it is, unless it is steep. A longer one rises beside its source to a lane above all
nodes, which it shares with the other wires of its output, and comes down beside its target. One within a column goes
back between two nodes.
"""

from collections import defaultdict
from dataclasses import dataclass, field

LANE, STEP, ASIDE = 26, 12, 20  # pixels between two lanes, between two wires that rise or fall, and to the next node
STEEP, CORNER = 300, 40  # pixels from which on a curve would swing far aside, and that it turns in
TITLE, ROW = 30, 20  # of a node: its title bar, above its position, and a slot
Nodes, Links = list[dict], list[list]  # of a workflow, as the frontend saves them; nodes of a column are as wide


def columns(nodes: Nodes) -> dict[int, int]:
    """The column of each node, from the left."""
    lefts = sorted({node["pos"][0] for node in nodes})
    return {node["id"]: lefts.index(node["pos"][0]) for node in nodes}


def height(node: dict, slot: int) -> float:
    """Where the frontend draws an input or output."""
    return node["pos"][1] + (slot + 0.7) * ROW


def far_wires(nodes: Nodes, links: Links) -> dict[tuple[int, int], dict[int, list[int]]]:
    """The wires that go farther than to the next column: of an output (node, slot), by the column where they end."""
    column, far = columns(nodes), defaultdict(lambda: defaultdict(list))
    for wire, source, output, target, *_ in links:
        if column[target] > column[source] + 1:
            far[source, output][column[target]].append(wire)
    return far


def steep_wires(nodes: Nodes, links: Links) -> list[list]:
    """The links to the next column that go far up or down."""
    by_id, column = {node["id"]: node for node in nodes}, columns(nodes)
    near = (link for link in links if column[link[3]] == column[link[1]] + 1)
    return [link for link in near if abs(height(by_id[link[1]], link[2]) - height(by_id[link[3]], link[4])) > STEEP]


def aisles(nodes: Nodes, links: Links) -> dict[int, int]:
    """The room on the left of each column, in pixels, for the wires that rise and fall there."""
    column, room = columns(nodes), defaultdict(int)
    for (source, _), ends in far_wires(nodes, links).items():
        for left in (column[source] + 1, *ends):
            room[left] += STEP
    for _, _, _, target, *_ in steep_wires(nodes, links):
        room[column[target]] += STEP
    return room


@dataclass
class Stops:
    """Reroutes, as the frontend saves them, and the last one of each wire."""

    reroutes: list[dict] = field(default_factory=list)
    last: dict[int, int] = field(default_factory=dict)

    def add(self, x: float, y: float, wires: list[int], parent: dict | None = None) -> dict:
        made = {"id": len(self.reroutes) + 1, "pos": [round(x), round(y)], "linkIds": wires}
        if parent is not None:
            made["parentId"] = parent["id"]
        self.reroutes.append(made)
        self.last |= dict.fromkeys(wires, made["id"])
        return made


def ways(nodes: Nodes, links: Links, top: float) -> dict:
    """The stops of all wires, as a workflow has them in `extra`; the lanes lie above `top`."""
    by_id, column, stops = {node["id"]: node for node in nodes}, columns(nodes), Stops()
    left = {column[node["id"]]: node["pos"][0] for node in nodes}
    right = {column[node["id"]]: node["pos"][0] + node["size"][0] for node in nodes}
    rising, falling = defaultdict(int), defaultdict(int)
    for wire, source, output, target, *_ in links:
        if (here := column[source]) == column[target]:
            x, begin, y = (
                right[here] + ASIDE / 2,
                height(by_id[source], output),
                by_id[target]["pos"][1] - TITLE - ROW / 2,
            )
            corner = stops.add(x, begin + CORNER, [wire]) if y - begin > STEEP else None
            stops.add(left[here] - ASIDE / 2, y, [wire], stops.add(x, y, [wire], corner))
    for wire, source, output, target, entry, *_ in steep_wires(nodes, links):
        begin, end = height(by_id[source], output), height(by_id[target], entry)
        turn, x = CORNER if end > begin else -CORNER, right[column[source]] + ASIDE + STEP * rising[column[source]]
        stops.add(x, end - turn, [wire], stops.add(x, begin + turn, [wire]))
        rising[column[source]] += 1

    far, into = far_wires(nodes, links), {link[0]: height(by_id[link[3]], link[4]) for link in links}
    lanes: list[int] = []  # the column where the last wire of each ends
    # those that end near to it run below those that go on: so they cross fewer
    for source, output in sorted(far, key=lambda way: (column[way[0]], max(far[way]), way)):
        begin, ends = column[source], far[source, output]
        lane = next((i for i, taken in enumerate(lanes) if taken <= begin), len(lanes))
        lanes[lane : lane + 1] = [max(ends)]
        y, x = top - LANE * (lane + 1), right[begin] + ASIDE + STEP * rising[begin]
        rising[begin] += 1
        wires, out = [wire for each in ends.values() for wire in each], height(by_id[source], output)
        corner = stops.add(x, out - CORNER, wires) if out - y > STEEP else None
        risen = stops.add(x, y, wires, corner)
        for end in sorted(ends):
            x = left[end] - ASIDE - STEP * falling[end]
            fallen = stops.add(x, y, ends[end], risen)
            falling[end] += 1
            for wire in ends[end]:
                if into[wire] - y > STEEP:
                    stops.add(x, into[wire] - CORNER, [wire], fallen)
    return {
        "reroutes": stops.reroutes,
        "linkExtensions": [{"id": wire, "parentId": stop} for wire, stop in sorted(stops.last.items())],
    }
