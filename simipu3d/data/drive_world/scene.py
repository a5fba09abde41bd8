"""What stands and moves in front of the sensors at a moment?

A scene is a function of its random generator and of the seconds it lasts; where things stand at a time t of it is
`Scene.at(t)`. Frames as in `layout`, metres and seconds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from simipu3d.data.drive_world.layout import Actor, Builder, draw_street, lay_blocks
from simipu3d.data.drive_world.raycast import World
from simipu3d.data.drive_world.render import Light
from simipu3d.data.drive_world.traffic import (
    Traffic,
    add_cyclists,
    add_pedestrians,
    drive_lanes,
    fill_side_streets,
    park_cars,
)


@dataclass(frozen=True)
class Ego:
    """How the ego vehicle drives: along +x, weaving a little in its lane; or stands, `turned` by so many radians."""

    y: float
    speed: float
    weave: float
    phase: float
    turned: float

    PERIOD = 9.0

    def pose(self, time: float) -> tuple[float, float, float]:
        """x, y and heading (radians) at `time`."""
        turn = 2 * np.pi / self.PERIOD
        angle = turn * time + self.phase
        aside = self.weave * self.speed / turn * np.sin(angle)
        return self.speed * time, self.y + aside, self.turned + self.weave * np.cos(angle)


@dataclass(frozen=True)
class Scene:
    """A street with everything in it at t = 0.

    Attributes:
        world: all solids at t = 0.
        instances: (P,) int32, the actor that a solid belongs to, 0 = none.
        velocities: (P, 3) metres a second.
        actors, ego, light: who moves, who looks, and the weather.
    """

    world: World
    instances: NDArray[np.int32]
    velocities: NDArray[np.float64]
    actors: list[Actor]
    ego: Ego
    light: Light

    def at(self, time: float) -> World:
        """All solids at `time`, seconds."""
        shape = self.world.shape.copy()
        shape[:, :3] += self.velocities * time
        return self.world._replace(shape=shape)


def build_scene(rng: Generator, duration: float, ego_speed: float | None = None) -> Scene:
    """Lay out a street for a drive of `duration` seconds; the ego vehicle's speed (m/s) is drawn where it is None."""
    speed = float(rng.uniform(3.0, 13.0)) if rng.random() < 0.85 else 0.0
    speed = speed if ego_speed is None else ego_speed
    street = draw_street(rng, speed * duration)
    lane = int(rng.integers(street.lanes))
    ego = _draw_ego(rng, speed, -(lane + 0.5) * street.lane)
    traffic = Traffic(duration)
    traffic.take(0.3, ego.y, 2.6, 1.2 + 2.0 * abs(np.sin(ego.turned)), (speed, 0.0), 0.0)
    builder = Builder(rng)
    busy = rng.uniform(0.35, 1.0)
    lay_blocks(builder, street)
    park_cars(builder, street, traffic, speed * duration, rng.uniform(0.1, 0.85))
    drive_lanes(builder, street, traffic, ego.y, speed, duration, busy)
    fill_side_streets(builder, street, traffic, busy)
    add_cyclists(builder, street, traffic, speed * duration)
    add_pedestrians(builder, street, traffic, speed * duration, duration)
    sizes = [street.half, street.side_half, street.lanes, street.lane, street.walk, rng.integers(100000)]
    crossings = np.stack([street.crossings, np.full(len(street.crossings), street.side_half)], axis=1)
    world = World(
        np.array(builder.kinds, dtype=np.int64),
        np.array(builder.rows, dtype=np.float64),
        np.array(builder.looks, dtype=np.float64),
        np.array(builder.labels, dtype=np.int64),
        np.array(sizes, dtype=np.float64),
        crossings,
    )
    instances = np.array(builder.instances, dtype=np.int32)
    velocities = np.array(builder.velocities, dtype=np.float64)
    return Scene(world, instances, velocities, builder.actors, ego, _draw_light(rng))


def _draw_ego(rng: Generator, speed: float, y: float) -> Ego:
    """An ego vehicle in the lane whose middle is `y`: it weaves by 0.35 m at most; a standing one is turned."""
    most = 0.35 * 2 * np.pi / Ego.PERIOD / max(speed, 1.0)
    weave, turned = min(abs(rng.normal(0, 0.07)), most), float(rng.normal(0, 0.2))
    moves = speed > 0
    return Ego(
        y=y + float(rng.normal(0, 0.12)),
        speed=speed,
        weave=weave if moves else 0.0,
        phase=float(rng.uniform(0, 2 * np.pi)),
        turned=0.0 if moves else turned,
    )


def _draw_light(rng: Generator) -> Light:
    """Sun and sky: from low and warm to high and white; three of ten days are overcast, with a weak high light."""
    azimuth, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.15)
    if rng.random() < 0.3:
        elevation, grey = np.radians(rng.uniform(62, 85)), rng.uniform(0.75, 1.0)
        sun, zenith, horizon, cover = (
            np.full(3, 0.35),
            np.array([0.72, 0.76, 0.8]) * grey,
            np.array([0.9, 0.92, 0.94]) * grey,
            0.95,
        )
    else:
        elevation = np.radians(rng.uniform(14, 62))
        warmth = float(np.exp(-elevation / 0.35))
        sun = np.array([1.0, 0.95 - 0.25 * warmth, 0.88 - 0.5 * warmth]) * 2.6
        zenith = np.array([0.16, 0.32, 0.75]) * rng.uniform(0.7, 1.1)
        horizon = np.array([0.72 + 0.3 * warmth, 0.8, 0.95 - 0.2 * warmth]) * rng.uniform(0.8, 1.0)
        cover = rng.uniform(0.0, 0.7)
    flat = np.cos(elevation)
    direction = np.array([flat * np.cos(azimuth), flat * np.sin(azimuth), np.sin(elevation)])
    return Light(
        direction,
        sun * strength,
        zenith * strength,
        horizon * strength,
        np.array([cover, rng.integers(1, 1000)], dtype=np.float64),
    )
