"""What does a camera see of the street, and how far away is it?

Pinhole, or a lens with OpenCV's distortion; integer-centre pixels. All columns are exposed at once, or each from a
pose of its own (a rolling shutter). Depth, class and solid of a pixel belong to the ray through its centre, exactly; its
colour is the mean of several rays where an outline or a shadow's edge passes, and one ray's elsewhere. Colours are
linear light until `develop`.
"""

import inspect
import math
import zlib
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.random import Generator
from numpy.typing import NDArray

from simipu3d.data.drive_world import materials, noise, raycast
from simipu3d.data.drive_world.materials import SKY, ground_texture, label_of, solid_texture
from simipu3d.data.drive_world.noise import cloud_noise, inner
from simipu3d.data.drive_world.raycast import (
    FOLIAGE,
    GROUND,
    NOTHING,
    Directions,
    Shadows,
    World,
    in_shadow,
    normal_of,
    place_on_solid,
    trace,
)


class Light(NamedTuple):
    """The weather.

    Attributes:
        sun: (3,) unit vector towards the sun, z positive.
        sunlight, zenith, horizon: (3,) red, green, blue of the sun, the sky above and the sky low down.
        clouds: (2,) share of the sky that is covered, seed of the clouds.
    """

    sun: NDArray[np.float64]
    sunlight: NDArray[np.float64]
    zenith: NDArray[np.float64]
    horizon: NDArray[np.float64]
    clouds: NDArray[np.float64]


@inner
def _sky(light, dx, dy, dz, with_clouds):
    """Colour of the sky: a gradient, a glow round the sun, and clouds on a plane overhead."""
    up = max(dz, 0.0)
    mix = math.sqrt(up)
    red = light.horizon[0] * (1 - mix) + light.zenith[0] * mix
    green = light.horizon[1] * (1 - mix) + light.zenith[1] * mix
    blue = light.horizon[2] * (1 - mix) + light.zenith[2] * mix
    towards = max(dx * light.sun[0] + dy * light.sun[1] + dz * light.sun[2], 0.0)
    glow = 0.35 * towards**24 + (6.0 if towards > 0.9994 else 0.0)
    red, green, blue = red + glow * light.sunlight[0], green + glow * light.sunlight[1], blue + glow * light.sunlight[2]
    if with_clouds and up > 0.01:
        density = cloud_noise(1.4 * dx / (up + 0.12), 1.4 * dy / (up + 0.12), int(light.clouds[1]))
        thick = min(max((density - 0.82 + 0.6 * light.clouds[0]) * 4.0, 0.0), 1.0) * min(up * 8.0, 1.0)
        white = (0.5 + 0.35 * density) * (light.horizon[1] + 0.35 * light.sunlight[1])
        red, green, blue = (
            red + (white - red) * thick,
            green + (white - green) * thick,
            blue + (white * 1.03 - blue) * thick,
        )
    return red, green, blue


@inner
def surface_at(world, solid, face, x, y, z, distance, dx, dy, dz, angle):
    """Texture and normal where a ray along (dx, dy, dz) met something at (x, y, z); `angle` is a pixel's, radians.

    Returns:
        red, green, blue, reflectivity, gloss, and the unit normal's x, y, z.
    """
    if solid == GROUND:
        footprint = distance * angle / math.sqrt(max(-dz, 0.02))
        red, green, blue, reflectivity, gloss = ground_texture(world, x, y, footprint)
        return red, green, blue, reflectivity, gloss, 0.0, 0.0, 1.0
    shape = world.shape[solid]
    px, py, pz = place_on_solid(shape, x, y, z)
    nx, ny, nz = normal_of(world.kind[solid], shape, face, px, py, pz)
    facing = -(nx * dx + ny * dy + nz * dz)
    footprint = distance * angle / math.sqrt(max(facing, 0.02))
    red, green, blue, reflectivity, gloss = solid_texture(world, solid, face, px, py, pz, x, y, footprint)
    return red, green, blue, reflectivity, gloss, nx, ny, nz


@inner
def _look_along(world, directions, shadows, light, dx, dy, dz, angle):
    """Colour along a unit vector, with what it met: (red, green, blue, distance, solid, face, shadowed)."""
    distance, solid, face = trace(world, directions, dx, dy, dz)
    if solid == NOTHING:
        red, green, blue = _sky(light, dx, dy, dz, True)
        return red, green, blue, distance, solid, face, False
    x = directions.origin[0] + distance * dx
    y = directions.origin[1] + distance * dy
    z = directions.origin[2] + distance * dz
    red, green, blue, _, gloss, nx, ny, nz = surface_at(world, solid, face, x, y, z, distance, dx, dy, dz, angle)
    facing = nx * light.sun[0] + ny * light.sun[1] + nz * light.sun[2]
    shadowed = True
    if facing > 0.0:
        shadowed = in_shadow(world, shadows, x + 2e-3 * nx, y + 2e-3 * ny, z + 2e-3 * nz)
    if solid >= 0 and world.kind[solid] == FOLIAGE:
        facing = 0.35 + 0.65 * max(facing, 0.0)
    direct = 0.0 if shadowed else max(facing, 0.0)
    above, level = 0.5 + 0.5 * nz, 0.5 - 0.5 * abs(nz)
    below = 0.5 - 0.5 * nz
    # Between houses and under cars less of the sky is seen: the ambient light grows with the height above the road.
    open_sky = 0.55 + 0.45 * min(max(z, 0.0) / 3.0, 1.0) if solid >= 0 else (0.62 if shadowed else 1.0)
    mirror = 2.0 * (nx * dx + ny * dy + nz * dz)
    rx, ry, rz = dx - mirror * nx, dy - mirror * ny, dz - mirror * nz
    graze = 1.0 - min(max(-0.5 * mirror, 0.0), 1.0)
    shine = gloss * (0.25 + 0.75 * graze**3) * min(max(4.0 * rz + 0.6, 0.12), 1.0)
    sky_red, sky_green, sky_blue = _sky(light, rx, ry, max(rz, 0.0), False) if gloss > 0.0 else (0.0, 0.0, 0.0)
    sheen = 1.0 if not shadowed else 0.45
    bounce = 0.12 * light.sun[2]
    high, low, warm = open_sky * 0.6 * above, open_sky * (0.4 * above + level), direct + bounce * below
    red *= light.sunlight[0] * warm + high * light.zenith[0] + low * light.horizon[0]
    green *= light.sunlight[1] * warm + high * light.zenith[1] + low * light.horizon[1]
    blue *= light.sunlight[2] * warm + high * light.zenith[2] + low * light.horizon[2]
    red, green, blue = red + shine * sheen * sky_red, green + shine * sheen * sky_green, blue + shine * sheen * sky_blue
    return red, green, blue, distance, solid, face, shadowed


@inner
def _from(directions, origin):
    """The same list of solids for a ray that leaves from another origin nearby."""
    return Directions(origin, directions.near, directions.starts, directions.items)


@inner
def _render(world, directions, shadows, light, rotations, origins, focal, centre, distortion, size, samples):
    """Colour (H, W, 3), depth (H, W), class (H, W) and solid (H, W) of every pixel; see `photograph`."""
    height, width = size
    angle = 1.0 / focal
    colour = np.empty((height, width, 3), dtype=np.float32)
    depth = np.zeros((height, width), dtype=np.float32)
    label = np.zeros((height, width), dtype=np.uint8)
    met = np.empty((height, width), dtype=np.int32)
    outline = np.empty((height, width), dtype=np.int32)
    for v in range(height):
        for u in range(width):
            own = _from(directions, origins[u])
            x, y = (u - centre[0]) / focal, (v - centre[1]) / focal
            dx, dy, dz, scale = _ray(rotations[u], distortion, x, y)
            red, green, blue, distance, solid, face, shadowed = _look_along(
                world, own, shadows, light, dx, dy, dz, angle * scale
            )
            colour[v, u, 0], colour[v, u, 1], colour[v, u, 2] = red, green, blue
            met[v, u] = solid
            outline[v, u] = solid * 16 + face * 2 + (1 if shadowed else 0)
            if solid == NOTHING:
                label[v, u] = SKY
            else:
                depth[v, u] = distance * scale
                x, y = own.origin[0] + distance * dx, own.origin[1] + distance * dy
                label[v, u] = label_of(world, solid, x, y)
    for v in range(height):
        for u in range(width):
            if samples > 1 and _on_outline(outline, v, u):
                own = _from(directions, origins[u])
                _refine(world, own, shadows, light, rotations[u], focal, centre, distortion, samples, u, v, colour)
    return colour, depth, label, met


@inner
def _straighten(distortion, x, y):
    """Undo the lens: the normalised coordinates x / z, y / z whose distorted image is (x, y), by fixed-point steps."""
    k1, k2, p1, p2, k3 = distortion
    if k1 == 0.0 and k2 == 0.0 and p1 == 0.0 and p2 == 0.0 and k3 == 0.0:
        return x, y
    a, b = x, y
    for _ in range(20):
        r2 = a * a + b * b
        radial = 1.0 + r2 * (k1 + r2 * (k2 + r2 * k3))
        aside = 2.0 * p1 * a * b + p2 * (r2 + 2.0 * a * a)
        down = p1 * (r2 + 2.0 * b * b) + 2.0 * p2 * a * b
        a, b = (x - aside) / radial, (y - down) / radial
    return a, b


@inner
def _ray(rotation, distortion, x, y):
    """Unit vector in the street of the camera ray that the lens images at (x, y, 1), and the cosine to its axis."""
    x, y = _straighten(distortion, x, y)
    scale = 1.0 / math.sqrt(x * x + y * y + 1.0)
    dx = (rotation[0, 0] * x + rotation[0, 1] * y + rotation[0, 2]) * scale
    dy = (rotation[1, 0] * x + rotation[1, 1] * y + rotation[1, 2]) * scale
    dz = (rotation[2, 0] * x + rotation[2, 1] * y + rotation[2, 2]) * scale
    return dx, dy, dz, scale


@inner
def _on_outline(outline, v, u):
    """Does a neighbour show another face, or the other side of a shadow's edge?"""
    here = outline[v, u]
    if v > 0 and outline[v - 1, u] != here:
        return True
    if u > 0 and outline[v, u - 1] != here:
        return True
    if v + 1 < outline.shape[0] and outline[v + 1, u] != here:
        return True
    return u + 1 < outline.shape[1] and outline[v, u + 1] != here


@inner
def _refine(world, directions, shadows, light, rotation, focal, centre, distortion, samples, u, v, colour):
    """Replace a pixel's colour by the mean of samples x samples rays spread over it."""
    red, green, blue = 0.0, 0.0, 0.0
    for j in range(samples):
        for i in range(samples):
            x = u + (i + 0.5) / samples - 0.5
            y = v + (j + 0.5) / samples - 0.5
            dx, dy, dz, scale = _ray(rotation, distortion, (x - centre[0]) / focal, (y - centre[1]) / focal)
            angle = scale / (focal * samples)
            r, g, b, _, _, _, _ = _look_along(world, directions, shadows, light, dx, dy, dz, angle)
            red, green, blue = red + r, green + g, blue + b
    share = 1.0 / (samples * samples)
    colour[v, u, 0], colour[v, u, 1], colour[v, u, 2] = red * share, green * share, blue * share


@inner
def _scan(world, directions, origins, rays):
    """See `scan_rays`."""
    count = len(rays)
    distance = np.full(count, np.inf)
    solid = np.full(count, NOTHING, dtype=np.int32)
    label = np.zeros(count, dtype=np.uint8)
    surface = np.zeros((count, 3))
    for n in range(count):
        dx, dy, dz = rays[n, 0], rays[n, 1], rays[n, 2]
        own = _from(directions, origins[n])
        t, item, face = trace(world, own, dx, dy, dz)
        if item == NOTHING:
            continue
        x, y, z = own.origin[0] + t * dx, own.origin[1] + t * dy, own.origin[2] + t * dz
        _, _, _, reflectivity, gloss, nx, ny, nz = surface_at(world, item, face, x, y, z, t, dx, dy, dz, 1e-3)
        distance[n], solid[n], label[n] = t, item, label_of(world, item, x, y)
        surface[n, 0], surface[n, 1], surface[n, 2] = reflectivity, gloss, abs(nx * dx + ny * dy + nz * dz)
    return distance, solid, label, surface


def _entry_points(sources: int):
    """The two kernels that Python calls, compiled once a machine.

    Numba files compiled code under the source of its own module and the values of its closure, and takes no notice of
    changes in the modules it calls. So only these two are cached, and their closure holds a checksum of the others.
    """

    @njit(cache=True, nogil=True)
    def render(world, directions, shadows, light, rotations, origins, focal, centre, distortion, size, samples):
        assert sources >= 0
        return _render(world, directions, shadows, light, rotations, origins, focal, centre, distortion, size, samples)

    @njit(cache=True, nogil=True)
    def scan(world, directions, origins, rays):
        assert sources >= 0
        return _scan(world, directions, origins, rays)

    return render, scan


_render_compiled, _scan_compiled = _entry_points(
    zlib.crc32("".join(inspect.getsource(module) for module in (noise, raycast, materials)).encode())
)


def scan_rays(
    world: World, directions: Directions, rays: NDArray[np.float64], origins: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.uint8], NDArray[np.float64]]:
    """Follow N lidar rays (N, 3), unit vectors in the street.

    Args:
        origins: (N, 3) where each ray leaves, within the slack of `directions`; None: all from its origin.

    Returns:
        distance (N,) metres, infinite where nothing is met; solid (N,); class (N,); and (N, 3): reflectivity, gloss and
        the cosine between the ray and the surface's normal.
    """
    if origins is None:
        origins = np.broadcast_to(directions.origin, rays.shape)
    return _scan_compiled(world, directions, np.ascontiguousarray(origins), np.ascontiguousarray(rays))


def photograph(
    world: World,
    directions: Directions,
    shadows: Shadows,
    light: Light,
    street_from_camera: NDArray[np.float64],
    image_from_camera: NDArray[np.float64],
    size: tuple[int, int],
    samples: int,
    *,
    origins: NDArray[np.float64] | None = None,
    distortion: NDArray[np.float64] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.uint8], NDArray[np.int32]]:
    """One picture of the world.

    Args:
        directions: the solids as seen from the camera's centre.
        street_from_camera: rotation, (3, 3), or (W, 3, 3), one a column; the camera's x right, y down, z forward.
        image_from_camera: (3, 3) with one focal length and no skew.
        size: height, width in pixels.
        samples: an outline's pixel is the mean of samples x samples rays.
        origins: (W, 3) the camera's centre while each column is exposed, within the slack of `directions`; None: always
            its origin.
        distortion: (5,) k1, k2, p1, p2, k3 of the lens, growing with the radius all over the image; None: a pinhole.

    Returns:
        colour (H, W, 3) linear, depth (H, W) metres along the optical axis (0 for sky), class (H, W), solid (H, W) or
        GROUND, NOTHING.
    """
    width = size[1]
    return _render_compiled(
        world,
        directions,
        shadows,
        light,
        np.ascontiguousarray(np.broadcast_to(street_from_camera, (width, 3, 3))),
        np.ascontiguousarray(np.broadcast_to(directions.origin if origins is None else origins, (width, 3))),
        image_from_camera[0, 0],
        image_from_camera[:2, 2].copy(),
        np.zeros(5) if distortion is None else np.asarray(distortion, dtype=np.float64),
        size,
        samples,
    )


def develop(
    colour: NDArray[np.float32], exposure: float, balance: NDArray, sigma: float, rng: Generator
) -> NDArray[np.uint8]:
    """Turn linear light into an 8-bit picture: exposure, white balance, lens shading, film curve, sensor noise.

    Args:
        colour: (H, W, 3) linear light.
        balance: (3,) gain of red, green and blue.
        sigma: standard deviation of the noise in the finished picture, in 8-bit steps.
    """
    height, width = colour.shape[:2]
    v = (np.arange(height, dtype=np.float32) - height / 2)[:, None] / width
    u = (np.arange(width, dtype=np.float32) - width / 2)[None] / width
    shading = exposure * (1.0 - 0.45 * (u * u + v * v))
    light = colour * shading[..., None] * balance.astype(np.float32)
    curved = (1.0 - np.exp(-light)) ** np.float32(1 / 2.2)
    steps = curved * 255 + sigma * rng.standard_normal(colour.shape, dtype=np.float32)
    return np.clip(np.rint(steps), 0, 255).astype(np.uint8)
