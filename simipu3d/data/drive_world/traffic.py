"""Who drives and walks in a street?

Everyone keeps one velocity for the whole scene, and a place is only taken by someone who stays clear of everyone placed
before. Units are metres and seconds; frames as in `layout`.
"""

import numpy as np

from simipu3d.data.drive_world import shapes
from simipu3d.data.drive_world.layout import KERB, Builder, Street


class Traffic:
    """Who occupies which piece of ground, as upright rectangles, at several moments of the scene."""

    def __init__(self, duration: float):
        self._times = np.linspace(0.0, duration, max(2, int(np.ceil(duration / 0.25)) + 1))
        self._boxes: list[tuple[float, ...]] = []

    def take(self, x: float, y: float, half_x: float, half_y: float, velocity: tuple[float, float], gap: float) -> bool:
        """Occupy a place when it stays `gap` metres from everyone else; says whether it did."""
        if self._boxes:
            boxes = np.array(self._boxes)
            dx = np.abs((boxes[:, :1] - x) + (boxes[:, 4:5] - velocity[0]) * self._times)
            dy = np.abs((boxes[:, 1:2] - y) + (boxes[:, 5:6] - velocity[1]) * self._times)
            if ((dx < boxes[:, 2:3] + half_x + gap) & (dy < boxes[:, 3:4] + half_y + gap)).any():
                return False
        self._boxes.append((x, y, half_x, half_y, *velocity))
        return True


def _vehicle(
    builder: Builder, traffic: Traffic, x: float, y: float, yaw: float, velocity: tuple[float, float], gap: float = 0.4
) -> None:
    """A car or van at (x, y), `yaw` a multiple of a right angle or close to it, when the place is free."""
    is_van = builder.rng.random() < 0.13
    parts = shapes.van(builder.rng) if is_van else shapes.car(builder.rng)
    low, high = shapes.bounds(parts)
    half = (high - low)[:2] / 2 if abs(np.cos(yaw)) > 0.7 else (high - low)[1::-1] / 2
    if traffic.take(x, y, float(half[0]), float(half[1]), velocity, gap):
        builder.act("Van" if is_van else "Car", parts, x, y, yaw, velocity)


def _near_crossing(street: Street, x: float, margin: float) -> bool:
    return bool((np.abs(street.crossings - x) < street.side_half + margin).any())


def park_cars(builder: Builder, street: Street, traffic: Traffic, travel: float, share: float) -> None:
    """Cars along both kerbs, away from side streets; most of them look the way their side drives."""
    rng = builder.rng
    if street.parking < 2.0:
        return
    for side in (-1, 1):
        x = -40.0 + rng.uniform(0, 5)
        while x < travel + 100:
            if rng.random() < share and not _near_crossing(street, x, 7.5):
                y = side * (street.half - 1.08 + rng.normal(0, 0.06))
                forward = (side < 0) == (rng.random() < 0.93)
                yaw = (0.0 if forward else np.pi) + rng.normal(0, 0.015)
                _vehicle(builder, traffic, x, y, yaw, (0.0, 0.0), 0.1)
            x += rng.uniform(5.4, 7.0)


def drive_lanes(
    builder: Builder, street: Street, traffic: Traffic, ego_y: float, ego_speed: float, duration: float, busy: float
) -> None:
    """Traffic in every lane; all of a lane drive at one speed, those of the ego lane at the ego vehicle's."""
    rng = builder.rng
    travel = ego_speed * duration
    for side in (-1, 1):
        for index in range(street.lanes):
            y = side * (index + 0.5) * street.lane
            own = abs(y - ego_y) < street.lane / 2
            moving = rng.uniform(3.0, 14.0) if rng.random() < 0.85 else 0.0
            velocity = ego_speed if own else -side * moving
            x = -45.0 + rng.exponential(12.0)
            while x < travel + 120 + abs(velocity) * duration:
                yaw = (0.0 if side < 0 else np.pi) + rng.normal(0, 0.012)
                _vehicle(builder, traffic, x, y + rng.normal(0, 0.15), yaw, (float(velocity), 0.0), 1.5)
                x += 6.5 + rng.exponential(14.0 / busy if abs(velocity) > 0 else 6.0 / busy)


def fill_side_streets(builder: Builder, street: Street, traffic: Traffic, busy: float) -> None:
    """Cars that wait at the stop line of a side street, and parked ones farther in."""
    rng = builder.rng
    for crossing in street.crossings:
        for side in (-1, 1):
            inwards = -side * np.pi / 2
            if rng.random() < 0.5 * busy:
                y = side * (street.half + 0.8 + rng.uniform(2.6, 4.0))
                _vehicle(builder, traffic, crossing - side * street.side_half * 0.48, y, inwards, (0.0, 0.0))
            for y in np.arange(street.half + 12, 62, 6.5):
                if rng.random() < 0.35:
                    kerb = 1 if rng.random() < 0.5 else -1
                    _vehicle(
                        builder, traffic, crossing + kerb * (street.side_half - 1.1), side * y, inwards, (0.0, 0.0), 0.2
                    )


def add_cyclists(builder: Builder, street: Street, traffic: Traffic, travel: float) -> None:
    """Cyclists at the right edge of the lanes."""
    rng = builder.rng
    for _ in range(rng.poisson(2.2)):
        side = -1 if rng.random() < 0.6 else 1
        x, y = rng.uniform(3, 55 + travel), side * (street.lanes * street.lane - 0.25 + rng.normal(0, 0.1))
        velocity = (-side * float(rng.uniform(3.0, 6.5)), 0.0)
        if traffic.take(x, y, 0.9, 0.28, velocity, 0.25):
            builder.act("Cyclist", shapes.cyclist(rng), x, y, 0.0 if side < 0 else np.pi, velocity)


def add_pedestrians(builder: Builder, street: Street, traffic: Traffic, travel: float, duration: float) -> None:
    """People on the sidewalks, alone or in small groups, and some on the crosswalks."""
    rng = builder.rng
    for _ in range(rng.poisson(7.0)):
        side, x = (-1 if rng.random() < 0.5 else 1), rng.uniform(3, 60 + travel)
        y = side * rng.uniform(street.half + 1.35, street.half + street.walk - 0.35)
        pace = float(rng.choice([-1, 1]) * rng.uniform(0.7, 1.7)) if rng.random() < 0.8 else 0.0
        for companion in range(1 + int(rng.random() < 0.3)):
            _pedestrian(
                builder, street, traffic, x + 0.3 * companion, y - 0.7 * companion * side, (pace, 0.0), KERB, duration
            )
    for crossing in street.crossings:
        for _ in range(rng.poisson(0.8)):
            x = crossing + rng.choice([-1, 1]) * (street.side_half + rng.uniform(1.4, 3.2))
            pace = float(rng.choice([-1, 1]) * rng.uniform(0.9, 1.6))
            y = rng.uniform(-street.half + 0.4, street.half - 0.4)
            _pedestrian(builder, street, traffic, x, y, (0.0, pace), 0.0, duration)


def _pedestrian(
    builder: Builder,
    street: Street,
    traffic: Traffic,
    x: float,
    y: float,
    velocity: tuple[float, float],
    floor: float,
    duration: float,
) -> None:
    """A person whose whole way stays on one level (a sidewalk's or the road's) and clear of everyone else."""
    rng = builder.rng
    for time in (0.0, duration):
        there_x, there_y = x + velocity[0] * time, abs(y + velocity[1] * time)
        on_walk = there_y > street.half + 0.3 and not _near_crossing(street, there_x, 0.4)
        if on_walk != (floor > 0) or (floor == 0 and there_y > street.half - 0.35):
            return
    walking = velocity != (0.0, 0.0)
    yaw = float(np.arctan2(velocity[1], velocity[0])) if walking else float(rng.uniform(-np.pi, np.pi))
    if traffic.take(x, y, 0.4, 0.4, velocity, 0.05):
        parts = shapes.raised(shapes.pedestrian(rng, walking), floor)
        builder.act("Pedestrian", parts, x, y, yaw, velocity)
