"""What stands in a street, and where?

The street runs along x, its middle is y = 0, z is up, metres; traffic keeps to the right, so the lanes with y < 0 lead
towards +x. Side streets cross it at right angles and cut the kerbs into blocks.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from simipu3d.data.drive_world import materials, shapes
from simipu3d.data.drive_world.raycast import HEX
from simipu3d.data.drive_world.shapes import Part

BEHIND, AHEAD = 90.0, 190.0
"""The street is built from so many metres behind the first place of the ego vehicle to so many beyond its last."""

KERB = 0.13
"""Height of the sidewalks, metres."""


@dataclass(frozen=True)
class Street:
    """Sizes of a street, metres: `half` is half the road's width with its `parking` lanes, `walk` a sidewalk's width,
    `side_half` half a side street, `crossings` (C,) where side streets meet it, `start` and `end` its ends."""

    lanes: int
    lane: float
    parking: float
    walk: float
    side_half: float
    crossings: NDArray[np.float64]
    start: float
    end: float

    @property
    def half(self) -> float:
        return self.lanes * self.lane + self.parking

    def blocks(self) -> list[tuple[float, float]]:
        """The stretches between side streets."""
        edges = [self.start, *(x + sign * self.side_half for x in self.crossings for sign in (-1, 1)), self.end]
        return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class Actor:
    """A car, van, pedestrian or cyclist: its tight box at t = 0 and how it moves.

    Attributes:
        name: Car, Van, Pedestrian or Cyclist.
        instance: 1, 2, ...; what point and pixel instances hold.
        centre, size: (3,) geometric centre in the street at t = 0; length, width, height.
        yaw: radians from the street's +x.
        velocity: (3,) metres a second, in the street.
    """

    name: str
    instance: int
    centre: NDArray[np.float64]
    size: NDArray[np.float64]
    yaw: float
    velocity: NDArray[np.float64]


@dataclass
class Builder:
    """Collects the solids of a scene while it is laid out."""

    rng: Generator
    kinds: list[int] = field(default_factory=list)
    rows: list[tuple[float, ...]] = field(default_factory=list)
    looks: list[tuple[float, ...]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    instances: list[int] = field(default_factory=list)
    velocities: list[tuple[float, float, float]] = field(default_factory=list)
    actors: list[Actor] = field(default_factory=list)

    def place(
        self,
        parts: list[Part],
        x: float,
        y: float,
        yaw: float = 0.0,
        instance: int = 0,
        velocity: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ) -> None:
        """Put a model at (x, y), turned by `yaw`."""
        cos, sin = float(np.cos(yaw)), float(np.sin(yaw))
        for part in parts:
            px, py, pz = part.centre
            self.kinds.append(part.kind)
            self.rows.append((x + cos * px - sin * py, y + sin * px + cos * py, pz, cos, sin, *part.half, *part.lean))
            self.looks.append(part.look)
            self.labels.append(part.label)
            self.instances.append(instance)
            self.velocities.append(velocity)

    def act(self, name: str, parts: list[Part], x: float, y: float, yaw: float, velocity: tuple[float, float]) -> None:
        """Put an actor's model at (x, y), and remember its box."""
        low, high = shapes.bounds(parts)
        middle = (low + high) / 2
        cos, sin = np.cos(yaw), np.sin(yaw)
        centre = np.array([x + cos * middle[0] - sin * middle[1], y + sin * middle[0] + cos * middle[1], middle[2]])
        moves = np.array([*velocity, 0.0])
        self.actors.append(Actor(name, len(self.actors) + 1, centre, high - low, yaw, moves))
        self.place(parts, x, y, yaw, len(self.actors), (*velocity, 0.0))


def draw_street(rng: Generator, travel: float) -> Street:
    """A street for a drive of `travel` metres."""
    lanes = 1 if rng.random() < 0.65 else 2
    start, end = -BEHIND, travel + AHEAD
    crossings, x = [], start + rng.uniform(20, 90)
    while x < end - 40:
        crossings.append(x)
        x += rng.uniform(45, 120)
    return Street(
        lanes=lanes,
        lane=float(rng.uniform(3.0, 3.7)),
        parking=2.3 if rng.random() < 0.75 else 0.6,
        walk=float(rng.uniform(2.2, 4.5)),
        side_half=float(rng.uniform(3.2, 5.5)),
        crossings=np.array(crossings),
        start=start,
        end=end,
    )


def lay_blocks(builder: Builder, street: Street) -> None:
    """Sidewalks and yards, houses, trees, lamps and signs, and the buildings far behind."""
    rng = builder.rng
    paving = shapes.vary(np.array([0.27, 0.26, 0.24]), rng, 0.2)
    yard = shapes.vary(np.array([0.10, 0.15, 0.05]) if rng.random() < 0.6 else np.array([0.2, 0.18, 0.15]), rng, 0.2)
    slab = shapes.look(
        materials.SLAB,
        paving,
        yard,
        (rng.uniform(0.4, 1.0), 0, 0, 0),
        seed=int(rng.integers(1, 9999)),
        reflectivity=0.3,
    )
    green = shapes.vary(np.array([0.055, 0.10, 0.025]), rng, 0.3)
    town = rng.random() < 0.6
    lined = rng.random((2,)) < 0.55
    for start, end in street.blocks():
        for side in (-1, 1):
            deep = 75.0
            part = Part(HEX, (0, 0, KERB / 2), ((end - start) / 2, deep / 2, KERB / 2), slab, materials.SIDEWALK)
            builder.place([part], (start + end) / 2, side * (street.half + deep / 2))
            _kerbside(builder, street, start, end, side, bool(lined[(side + 1) // 2]), green)
            front = street.half + street.walk
            if rng.random() < 0.86:
                _row_of_houses(builder, start + street.walk, end - street.walk, side, front, town, green)
                _row_of_houses(
                    builder, start + street.walk, end - street.walk, side, front + rng.uniform(20, 32), town, green
                )
            else:
                _park(builder, start + street.walk, end - street.walk, side, front, green)
    _backdrop(builder, street)


def _row_of_houses(
    builder: Builder, start: float, end: float, side: int, front: float, town: bool, green: NDArray[np.float64]
) -> None:
    """Houses from `start` to `end` behind the line |y| = `front`, with gaps, setbacks and front gardens."""
    rng = builder.rng
    x = start + rng.uniform(0, 3)
    setback = rng.uniform(0, 1.0) if town else rng.uniform(2.0, 7.0)
    while x < end - 6:
        width = min(rng.uniform(8, 24) if town else rng.uniform(8, 14), end - x)
        depth = rng.uniform(9, 14)
        height = rng.uniform(8, 24) if town else rng.uniform(4.5, 8.5)
        back = setback + (rng.uniform(0, 5) if rng.random() < 0.3 else 0.0)
        colour = shapes.WALL_COLOURS[rng.integers(len(shapes.WALL_COLOURS))]
        roofed = bool(rng.random() < (0.2 if town else 0.85)) and height < 14
        house = shapes.building(rng, width / 2, depth / 2, height, roofed, colour)
        builder.place(shapes.raised(house, KERB / 2), x + width / 2, side * (front + back + depth / 2))
        if back > 1.8 and rng.random() < 0.6:
            hedge = shapes.hedge(rng, width / 2 - 0.8, 0.35, green)
            builder.place(shapes.raised(hedge, KERB), x + width / 2, side * (front + 0.5))
        if back > 3.2 and rng.random() < 0.5:
            place = x + rng.uniform(1, width - 1), side * (front + back / 2 + 0.4)
            builder.place(shapes.raised(shapes.tree(rng, green), KERB), *place)
        x += width
        if rng.random() < (0.35 if town else 0.9):
            x += rng.uniform(2.0, 9.0)


def _park(builder: Builder, start: float, end: float, side: int, front: float, green: NDArray[np.float64]) -> None:
    """Trees on a lawn."""
    rng = builder.rng
    for _ in range(int((end - start) / 6)):
        x, y = rng.uniform(start + 2, end - 2), side * (front + rng.uniform(2, 30))
        builder.place(shapes.raised(shapes.tree(rng, green), KERB), x, y)


def _kerbside(
    builder: Builder, street: Street, start: float, end: float, side: int, lined: bool, green: NDArray[np.float64]
) -> None:
    """Lamps, signs, traffic lights and trees between the kerb and the walkers."""
    rng = builder.rng
    x = start + 3 + rng.uniform(0, 15)
    while x < end - 3:
        builder.place(shapes.raised(shapes.lamp(rng, -side), KERB), x, side * (street.half + 0.35))
        if rng.random() < 0.5 and x + 4 < end:
            builder.place(shapes.raised(shapes.sign(rng), KERB), x + rng.uniform(1.5, 4.0), side * (street.half + 0.45))
        x += rng.uniform(18, 32)
    if start > street.start and rng.random() < 0.5:
        corner = start + 0.6 if side > 0 else end - 0.6
        lights = shapes.raised(shapes.traffic_light(rng), KERB)
        builder.place(lights, corner, side * (street.half + 0.5), 0.0 if side < 0 else np.pi)
    x = start + rng.uniform(4, 9)
    while lined and x < end - 4:
        if rng.random() < 0.85:
            builder.place(shapes.raised(shapes.tree(rng, green), KERB), x, side * (street.half + 0.6))
        x += rng.uniform(7, 13)


def _backdrop(builder: Builder, street: Street) -> None:
    """Large buildings and trees at both ends of the street and beyond the yards; no view ends at a bare horizon."""
    rng = builder.rng
    spots = [(x, side * rng.uniform(95, 130)) for side in (-1, 1) for x in np.arange(street.start, street.end, 24.0)]
    for x in (street.start - 14, street.end + 14):
        spots += [(x + rng.uniform(-6, 6), y) for y in np.arange(-88, 89, 22.0) if abs(y) > 8 or rng.random() < 0.55]
    for x, y in spots:
        colour = shapes.WALL_COLOURS[rng.integers(len(shapes.WALL_COLOURS))]
        half_x, half_y, height = rng.uniform(5, 11), rng.uniform(5, 10.5), rng.uniform(7, 32)
        builder.place(shapes.building(rng, half_x, half_y, height, bool(height < 12), colour), x, y)
