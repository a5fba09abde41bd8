"""What are cars, people, trees and houses made of?

A model is a list of parts in its own frame: x forward, y left, z up, origin on the ground below its middle, metres.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from simipu3d.data.drive_world import materials
from simipu3d.data.drive_world.raycast import CYL_Y, CYL_Z, ELLIPSOID, FOLIAGE, HEX, RING

Triple = tuple[float, float, float]

CAR_COLOURS = np.array(
    [
        [0.75, 0.75, 0.74],
        [0.015, 0.015, 0.018],
        [0.16, 0.17, 0.18],
        [0.42, 0.43, 0.44],
        [0.03, 0.06, 0.22],
        [0.36, 0.02, 0.02],
        [0.02, 0.13, 0.08],
        [0.55, 0.42, 0.06],
        [0.30, 0.22, 0.14],
        [0.07, 0.22, 0.42],
    ]
)
CAR_COLOUR_SHARES = np.array([0.24, 0.19, 0.17, 0.14, 0.08, 0.06, 0.03, 0.03, 0.03, 0.03])
WALL_COLOURS = np.array(
    [
        [0.30, 0.10, 0.06],
        [0.52, 0.40, 0.25],
        [0.42, 0.41, 0.39],
        [0.68, 0.66, 0.60],
        [0.56, 0.36, 0.14],
        [0.20, 0.20, 0.21],
        [0.36, 0.22, 0.14],
        [0.42, 0.50, 0.48],
        [0.60, 0.45, 0.40],
        [0.30, 0.34, 0.24],
    ]
)
SKIN_COLOURS = np.array([[0.55, 0.33, 0.22], [0.36, 0.19, 0.11], [0.12, 0.06, 0.035], [0.62, 0.40, 0.29]])
BLACK = (0.012, 0.012, 0.012)
METAL = (0.30, 0.31, 0.32)


@dataclass(frozen=True)
class Part:
    """One solid of a model: `lean` is (front, back, side), the leaning of a HEX; `look` as in `materials`."""

    kind: int
    centre: Triple
    half: Triple
    look: tuple[float, ...]
    label: int
    lean: Triple = (0.0, 0.0, 0.0)


def look(
    texture: int,
    first: NDArray | Triple,
    second: NDArray | Triple = METAL,
    parameters: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0),
    *,
    seed: int = 0,
    reflectivity: float = 0.35,
    gloss: float = 0.0,
) -> tuple[float, ...]:
    """A row of `World.look`."""
    return (float(texture), *map(float, first), *map(float, second), *parameters, float(seed), reflectivity, gloss)


def vary(colour: NDArray, rng: Generator, spread: float = 0.15) -> NDArray[np.float64]:
    """The colour, each channel moved a little and all of them together; inside [0.005, 0.9]."""
    return np.clip(colour * np.exp(rng.normal(0, spread, 3) * 0.4 + rng.normal(0, spread)), 0.005, 0.9)


def cloth_colour(rng: Generator) -> NDArray[np.float64]:
    """A colour of clothes: often dark, sometimes bright."""
    grey, tint = rng.uniform(0.02, 0.6) ** 1.5, rng.uniform(0.02, 0.9, 3)
    return np.clip(grey + rng.uniform(0.05, 0.6) ** 1.5 * (tint - tint.mean()), 0.01, 0.8)


def bounds(parts: list[Part]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lowest and highest corner (3,) of the tight box of a model, in its own frame."""
    low, high = [], []
    for part in parts:
        hx, hy, hz = part.half
        reach = np.array([[-hx, -hy, -hz], [hx, hy, hz]])
        if part.kind == HEX:
            front, back, side = part.lean
            reach[0, 0], reach[1, 0] = min(-hx, -hx + 2 * hz * back), max(hx, hx - 2 * hz * front)
            reach[1, 1] = max(hy, hy - 2 * hz * side)
            reach[0, 1] = -reach[1, 1]
        elif part.kind in (CYL_Y, RING):
            reach[:, 2] = -hx, hx
            if part.kind == RING:
                reach[:, 1] = 0.0
        low.append(reach[0] + part.centre)
        high.append(reach[1] + part.centre)
    return np.min(low, axis=0), np.max(high, axis=0)


def _wheels(length: float, width: float, radius: float, axles: tuple[float, float], label: int) -> list[Part]:
    tyre = look(materials.WHEEL, BLACK, (0.38, 0.38, 0.4), reflectivity=0.06)
    places = [(x, side * (width / 2 - 0.09), radius) for x in axles for side in (-1, 1)]
    return [Part(CYL_Y, place, (radius, 0.1, radius), tyre, label) for place in places]


def car(rng: Generator) -> list[Part]:
    """A saloon, hatchback or SUV: body, cabin, four wheels."""
    form = rng.choice(3, p=[0.4, 0.35, 0.25])
    length = rng.uniform(*((4.3, 4.95), (3.6, 4.3), (4.3, 4.9))[form])
    height = rng.uniform(*((1.40, 1.50), (1.46, 1.58), (1.62, 1.80))[form])
    width, radius = rng.uniform(1.68, 1.92), rng.uniform(0.30, 0.35) + 0.04 * (form == 2)
    floor, belt = 0.2 + 0.06 * (form == 2), 0.61 * height
    colour = vary(CAR_COLOURS[rng.choice(len(CAR_COLOURS), p=CAR_COLOUR_SHARES)], rng)
    axles = (0.31 * length, -0.30 * length)
    reflectivity = 0.1 + 0.5 * float(colour.mean())
    paint = look(materials.PAINT, colour, METAL, (*axles, radius, 0.0), reflectivity=reflectivity, gloss=0.25)
    roof = look(materials.CABIN, colour, reflectivity=reflectivity, gloss=0.25)
    rear = (-0.37, -0.46, -0.47)[form] * length
    front = (0.22, 0.24, 0.23)[form] * length
    half_height = (height - belt + 0.02) / 2
    lean = ((0.95, 0.85, 0.26), (0.85, 0.40, 0.24), (0.70, 0.28, 0.20))[form]
    body = (belt - floor) / 2
    return [
        Part(HEX, (0, 0, floor + body), (length / 2, width / 2, body), paint, materials.CAR, (0.2, 0.12, 0.06)),
        Part(
            HEX,
            ((front + rear) / 2, 0, height - half_height),
            ((front - rear) / 2, width / 2 - 0.06, half_height),
            roof,
            materials.CAR,
            lean,
        ),
        *_wheels(length, width, radius, axles, materials.CAR),
    ]


def van(rng: Generator) -> list[Part]:
    """A delivery van or a minibus."""
    length, width, height = rng.uniform(4.7, 6.0), rng.uniform(1.9, 2.08), rng.uniform(1.95, 2.6)
    radius, floor, bonnet = 0.35, 0.28, rng.uniform(0.7, 0.95)
    colour = vary(CAR_COLOURS[rng.choice(len(CAR_COLOURS), p=CAR_COLOUR_SHARES)], rng)
    if rng.random() < 0.45:
        colour = np.array([0.72, 0.72, 0.7])
    axles = (length / 2 - 0.95, -0.29 * length)
    windows = 0.15 if rng.random() < 0.4 else 1.5
    reflectivity = 0.1 + 0.5 * float(colour.mean())
    tall = (height - floor) / 2
    low = (0.46 * height + 0.12 - floor) / 2
    shift = bonnet / 2 - 0.05
    box = look(
        materials.PAINT,
        colour,
        METAL,
        (axles[0] + shift, axles[1] + shift, radius, windows),
        reflectivity=reflectivity,
        gloss=0.2,
    )
    nose = look(
        materials.PAINT,
        colour,
        METAL,
        (axles[0] - length / 2 + 0.6, -9.0, radius, 0.0),
        reflectivity=reflectivity,
        gloss=0.2,
    )
    half_box = (length - bonnet + 0.1) / 2
    return [
        Part(HEX, (-shift, 0, floor + tall), (half_box, width / 2, tall), box, materials.VAN, (0.3, 0.03, 0.05)),
        Part(
            HEX,
            (length / 2 - 0.6, 0, floor + low),
            (0.6, width / 2 - 0.01, low),
            nose,
            materials.VAN,
            (0.28, 0.0, 0.05),
        ),
        *_wheels(length, width, radius, axles, materials.VAN),
    ]


def _limb(foot: Triple, top: Triple, half_x: float, half_y: float, paint: tuple[float, ...], label: int) -> Part:
    """A leg or arm from `foot` up to `top`: a HEX whose front and back lean together."""
    half_z = (top[2] - foot[2]) / 2
    shear = (top[0] - foot[0]) / (2 * half_z)
    return Part(HEX, (foot[0], foot[1], foot[2] + half_z), (half_x, half_y, half_z), paint, label, (-shear, shear, 0.0))


def pedestrian(rng: Generator, walking: bool) -> list[Part]:
    """A person with trousers, jacket, arms, head and hair, in mid-stride when walking."""
    h = rng.uniform(1.05, 1.4) if rng.random() < 0.1 else rng.uniform(1.55, 1.92)
    label = materials.PEDESTRIAN
    jacket, trousers = (
        look(materials.CLOTH, cloth_colour(rng), seed=int(rng.integers(1000)), reflectivity=rng.uniform(0.2, 0.6))
        for _ in range(2)
    )
    skin = look(materials.PLAIN, SKIN_COLOURS[rng.integers(len(SKIN_COLOURS))], reflectivity=0.45)
    hair = look(materials.PLAIN, vary(np.array([0.05, 0.03, 0.02]), rng, 0.8), reflectivity=0.25)
    stride = rng.uniform(0.1, 0.24) * h if walking else 0.02
    broad = rng.uniform(0.19, 0.25) * h / 1.75
    return [
        _limb((stride, 0.5 * broad, 0.0), (0.0, 0.5 * broad, 0.5 * h), 0.075, 0.075, trousers, label),
        _limb((-stride, -0.5 * broad, 0.0), (0.0, -0.5 * broad, 0.5 * h), 0.075, 0.075, trousers, label),
        Part(ELLIPSOID, (0, 0, 0.65 * h), (0.14, broad, 0.2 * h), jacket, label),
        _limb((-0.6 * stride, broad, 0.42 * h), (0.0, broad, 0.8 * h), 0.05, 0.05, jacket, label),
        _limb((0.6 * stride, -broad, 0.42 * h), (0.0, -broad, 0.8 * h), 0.05, 0.05, jacket, label),
        Part(ELLIPSOID, (0.01, 0, h - 0.14), (0.1, 0.085, 0.13), skin, label),
        Part(ELLIPSOID, (-0.02, 0, h - 0.1), (0.1, 0.095, 0.1), hair, label),
    ]


def cyclist(rng: Generator) -> list[Part]:
    """A bicycle and its rider."""
    label = materials.CYCLIST
    frame = look(materials.PLAIN, vary(CAR_COLOURS[rng.integers(len(CAR_COLOURS))], rng), reflectivity=0.3, gloss=0.1)
    tyre = look(materials.PLAIN, BLACK, reflectivity=0.08)
    jacket, trousers = (
        look(materials.CLOTH, cloth_colour(rng), seed=int(rng.integers(1000)), reflectivity=0.4) for _ in range(2)
    )
    skin = look(materials.PLAIN, SKIN_COLOURS[rng.integers(len(SKIN_COLOURS))], reflectivity=0.45)
    helmet = look(materials.PLAIN, rng.uniform(0.02, 0.8, 3), reflectivity=0.4, gloss=0.15)
    parts = [Part(RING, (x, 0, 0.35), (0.35, 0.0, 0.30), tyre, label) for x in (-0.53, 0.53)]
    parts += [Part(HEX, (x, 0, 0.35), (0.34, 0.02, 0.02), tyre, label) for x in (-0.53, 0.53)]
    parts += [Part(HEX, (x, 0, 0.36), (0.02, 0.022, 0.34), tyre, label) for x in (-0.53, 0.53)]
    parts += [
        _limb((-0.02, 0.0, 0.32), (0.42, 0.0, 0.82), 0.03, 0.022, frame, label),
        Part(HEX, (0.12, 0, 0.8), (0.3, 0.022, 0.022), frame, label),
        Part(CYL_Z, (-0.16, 0, 0.62), (0.025, 0.025, 0.3), frame, label),
        _limb((0.53, 0.0, 0.35), (0.42, 0.0, 1.02), 0.025, 0.022, frame, label),
        Part(HEX, (0.42, 0, 1.03), (0.025, 0.27, 0.02), frame, label),
        _limb((-0.18, 0.0, 0.9), (0.16, 0.0, 1.46), 0.12, 0.17, jacket, label),
    ]
    for side in (-1, 1):
        parts.append(
            _limb((0.06 + 0.1 * side, 0.1 * side, 0.3), (-0.1, 0.1 * side, 0.98), 0.07, 0.065, trousers, label)
        )
        arm = _limb((0.4, 0.22 * side, 1.04), (0.16, 0.22 * side, 1.42), 0.045, 0.045, jacket, label)
        parts.append(arm)
    parts.append(Part(ELLIPSOID, (0.25, 0, 1.6), (0.1, 0.085, 0.13), skin, label))
    parts.append(Part(ELLIPSOID, (0.23, 0, 1.66), (0.13, 0.1, 0.09), helmet, label))
    return parts


def tree(rng: Generator, colour: NDArray) -> list[Part]:
    """A trunk under three to five balls of leaves, or a conifer."""
    label, seed = materials.VEGETATION, int(rng.integers(1, 1000))
    bark = look(materials.CLOTH, vary(np.array([0.10, 0.075, 0.05]), rng), seed=seed, reflectivity=0.3)
    first = vary(colour, rng, 0.12)
    leaves = look(materials.LEAVES, first, first * (1.7, 1.5, 1.0), seed=seed, reflectivity=0.55)
    size, clear = rng.uniform(1.1, 2.4), rng.uniform(2.1, 3.2)
    radius = rng.uniform(0.10, 0.22)
    trunk = (clear + size) / 2
    parts = [Part(CYL_Z, (0, 0, trunk), (radius, radius, trunk), bark, label)]
    if rng.random() < 0.2:
        for level in range(4):
            wide = size * (1.0 - 0.22 * level)
            parts.append(Part(FOLIAGE, (0, 0, 1.6 + 1.3 * level), (wide, wide, 1.1), leaves, label))
        return parts
    for _ in range(rng.integers(3, 6)):
        ball = size * rng.uniform(0.65, 1.0)
        x, y = rng.uniform(-0.5, 0.5, 2) * size
        z = clear + size * rng.uniform(0.55, 1.4)
        parts.append(
            Part(
                FOLIAGE, (x, y, z), (ball, ball * rng.uniform(0.85, 1.1), ball * rng.uniform(0.7, 0.95)), leaves, label
            )
        )
    return parts


def hedge(rng: Generator, half_x: float, half_y: float, colour: NDArray) -> list[Part]:
    """A clipped hedge."""
    first, half_z = vary(colour, rng), rng.uniform(0.35, 0.8)
    leaves = look(materials.LEAVES, first, first * 1.5, seed=int(rng.integers(1, 1000)), reflectivity=0.55)
    return [Part(HEX, (0, 0, half_z), (half_x, half_y, half_z), leaves, materials.VEGETATION)]


def lamp(rng: Generator, towards: float) -> list[Part]:
    """A street lamp whose arm reaches `towards` (+1 or -1) along y."""
    height, label = rng.uniform(5.5, 8.5), materials.POLE
    grey = look(materials.PLAIN, vary(np.array([0.2, 0.21, 0.22]), rng, 0.4), reflectivity=0.4)
    head = look(materials.PLAIN, (0.5, 0.5, 0.48), reflectivity=0.4)
    return [
        Part(CYL_Z, (0, 0, height / 2), (0.08, 0.08, height / 2), grey, label),
        Part(HEX, (0, 0.75 * towards, height - 0.05), (0.04, 0.75, 0.04), grey, label),
        Part(HEX, (0, 1.6 * towards, height - 0.08), (0.14, 0.35, 0.06), head, label),
    ]


def sign(rng: Generator) -> list[Part]:
    """A traffic sign whose plate faces +x and -x."""
    height, label = rng.uniform(2.2, 2.8), materials.POLE
    colours = np.array([[0.6, 0.02, 0.02], [0.02, 0.08, 0.5], [0.75, 0.6, 0.02], [0.75, 0.75, 0.75]])
    face = colours[rng.integers(len(colours))]
    grey = look(materials.PLAIN, METAL, reflectivity=0.4)
    bar = float(rng.random() < 0.5)
    plate = look(materials.PLATE, face, (0.8, 0.8, 0.8), (bar, 0.0, 0.0, 0.0), reflectivity=0.95)
    half = rng.uniform(0.26, 0.38)
    return [
        Part(CYL_Z, (0, 0, height / 2), (0.035, 0.035, height / 2), grey, label),
        Part(HEX, (0.05, 0, height - half), (0.012, half, half), plate, label),
    ]


def traffic_light(rng: Generator) -> list[Part]:
    """A post with a dark box of three lamps, one of them lit; it faces -x."""
    label = materials.POLE
    grey = look(materials.PLAIN, (0.12, 0.12, 0.13), reflectivity=0.3)
    parts = [
        Part(CYL_Z, (0, 0, 1.7), (0.07, 0.07, 1.7), grey, label),
        Part(HEX, (-0.05, 0, 2.95), (0.12, 0.16, 0.46), look(materials.PLAIN, BLACK, reflectivity=0.1), label),
    ]
    lit = rng.integers(3)
    for index, colour in enumerate([(0.02, 0.9, 0.25), (0.95, 0.5, 0.02), (0.95, 0.03, 0.02)]):
        shown = np.array(colour) * (1.0 if index == lit else 0.06)
        lens = look(materials.PLAIN, shown, reflectivity=0.3)
        parts.append(Part(HEX, (-0.18, 0, 2.66 + 0.29 * index), (0.015, 0.1, 0.1), lens, label))
    return parts


def building(rng: Generator, half_x: float, half_y: float, height: float, roofed: bool, colour: NDArray) -> list[Part]:
    """A block of floors; with `roofed` it wears a hipped roof."""
    seed = int(rng.integers(1, 100000))
    brick = float(colour[0] > 1.6 * colour[2] and rng.random() < 0.7)
    trim = vary(np.array([0.55, 0.53, 0.5]) if rng.random() < 0.6 else np.array([0.1, 0.1, 0.1]), rng)
    pitch, share = rng.uniform(1.5, 4.2), rng.uniform(0.35, 0.72)
    if rng.random() < 0.15:
        pitch, share = rng.uniform(1.2, 1.8), 0.86
    wall = look(
        materials.FACADE,
        vary(colour, rng, 0.25),
        trim,
        (rng.uniform(2.7, 3.6), pitch, share, brick),
        seed=seed,
        reflectivity=rng.uniform(0.3, 0.6),
        gloss=float(rng.random() < 0.35 and not roofed),
    )
    parts = [Part(HEX, (0, 0, height / 2), (half_x, half_y, height / 2), wall, materials.BUILDING)]
    if roofed:
        rise = rng.uniform(1.2, 2.2)
        lean = 0.9 * min(half_x, half_y) / (2 * rise)
        tiles = vary(np.array([0.28, 0.09, 0.05]) if rng.random() < 0.6 else np.array([0.1, 0.1, 0.11]), rng)
        roof = look(materials.CLOTH, tiles, seed=seed, reflectivity=0.4)
        eaves = (half_x + 0.4, half_y + 0.4, rise)
        parts.append(Part(HEX, (0, 0, height + rise), eaves, roof, materials.BUILDING, (lean, lean, lean)))
    return parts


def raised(parts: list[Part], z: float) -> list[Part]:
    """The model, standing `z` metres higher."""
    return [replace(part, centre=(part.centre[0], part.centre[1], part.centre[2] + z)) for part in parts]
