"""What colour has a place on a surface, and how does it answer to the lidar?

Every solid has a row of `look`, 14 numbers:

    0 texture   1-3 first colour   4-6 second colour (linear light, 0 to 1)   7-10 four parameters of the texture
    11 seed     12 reflectivity at the lidar's wavelength, 0 to 1             13 gloss, 0 (matt) to 1 (mirror)

A texture is a function of the place in the solid's own frame (x, y, z; metres), the face and the footprint of a pixel
there (metres): detail finer than the footprint fades to its average, so that far walls do not flicker. Its answer is
(red, green, blue, reflectivity, gloss).

`street` holds 6 numbers: half width of the road, half width of a side street, lanes a direction, lane width, width of a
sidewalk (metres) and the seed of the asphalt.
"""

import math

from simipu3d.data.drive_world.noise import cloud_noise, inner, lattice, value_noise
from simipu3d.data.drive_world.raycast import BACK, BOTTOM, CYL_Y, FRONT, GROUND, LEFT, RIGHT, TOP

PLAIN, SLAB, FACADE, PAINT, CABIN, WHEEL, LEAVES, CLOTH, PLATE = range(9)
"""The textures."""

CLASS_NAMES = (
    "sky",
    "road",
    "sidewalk",
    "terrain",
    "building",
    "pole",
    "vegetation",
    "car",
    "van",
    "pedestrian",
    "cyclist",
)
"""What `pixel_class` and `point_class` index. Vehicles are car and van."""

SKY, ROAD, SIDEWALK, TERRAIN, BUILDING, POLE, VEGETATION, CAR, VAN, PEDESTRIAN, CYCLIST = range(11)


@inner
def _keep(period, footprint):
    """How much of a pattern of this period a pixel still shows, 1 to 0."""
    return min(max(1.5 - 2.0 * footprint / period, 0.0), 1.0)


@inner
def _between(value, low, high):
    return low < value < high


@inner
def _on_crossing(crossings, x, margin):
    """Is x within `margin` metres of a side street?"""
    near = False
    for k in range(len(crossings)):
        near = near or abs(x - crossings[k, 0]) < crossings[k, 1] + margin
    return near


@inner
def label_of(world, solid, x, y):
    """Class of a hit at (x, y) of the street."""
    if solid == GROUND:
        on_road = abs(y) < world.street[0] or _on_crossing(world.crossings, x, 0.0)
        return ROAD if on_road else TERRAIN
    if world.look[solid, 0] == SLAB:
        width = world.street[4]
        if abs(y) < world.street[0] + width or _on_crossing(world.crossings, x, width):
            return SIDEWALK
        return TERRAIN
    return world.label[solid]


@inner
def _marked(world, x, y, footprint):
    """How much of a place on the road is white paint, 0 to 1."""
    half, lanes, lane = world.street[0], int(world.street[2]), world.street[3]
    crossings = world.crossings
    if _on_crossing(crossings, x, 0.6) or abs(y) > half:
        return 0.0
    for k in range(len(crossings)):
        beyond = abs(x - crossings[k, 0]) - crossings[k, 1]
        if _between(beyond, 1.0, 3.6):
            return (0.9 if (y + half) % 1.1 < 0.55 else 0.0) * _keep(1.1, footprint) + 0.45 * (
                1.0 - _keep(1.1, footprint)
            )
        right_of_way = (x < crossings[k, 0]) == (y < 0.0)
        if right_of_way and _between(beyond, 4.4, 4.8) and abs(y) < lanes * lane:
            return 0.9
    if abs(y) < 0.25:
        if lanes > 1:
            return 0.85 if abs(y) > 0.1 else 0.0
        return 0.85 if abs(y) < 0.07 and x % 9.0 < 4.0 else 0.0
    edge = abs(abs(y) - lanes * lane)
    if edge < 0.07 and half > lanes * lane + 0.5:
        return 0.8
    if lanes > 1 and abs(abs(y) - lane) < 0.07 and x % 9.0 < 3.0:
        return 0.85
    return 0.0


@inner
def ground_texture(world, x, y, footprint):
    """The plane z = 0: asphalt with its markings, or grass and gravel beside the streets."""
    seed = int(world.street[5])
    rough = cloud_noise(0.35 * x, 0.35 * y, seed)
    fine = (value_noise(14.0 * x, 14.0 * y, seed + 9) - 0.5) * _keep(0.14, footprint)
    if label_of(world, GROUND, x, y) == TERRAIN:
        tone = 0.6 + 0.7 * rough + 0.5 * fine
        green = lattice(seed, 3, 0, 0) * 0.5 + 0.5 * rough
        return 0.16 * tone, (0.13 + 0.06 * green) * tone, 0.07 * tone, 0.45, 0.0
    base = 0.07 + 0.16 * lattice(seed, 1, 0, 0)
    tone = base * (0.8 + 0.4 * rough + 0.5 * fine)
    patch = lattice(math.floor(x / 7.0), math.floor(y / 2.3), 5, seed)
    if patch > 0.93:
        tone *= 0.62
    lane = world.street[3]
    worn = abs((abs(y) % lane) - 0.5 * lane)
    tone *= 1.0 - 0.13 * max(0.0, 1.0 - abs(worn - 0.75) * 3.0)
    if value_noise(0.9 * x + 3.0 * rough, 0.9 * y, seed + 4) > 0.49 and value_noise(0.9 * x, 0.9 * y, seed + 4) < 0.505:
        tone *= 0.85
    paint = _marked(world, x, y, footprint) * (0.55 + 0.45 * rough)
    red = tone * (1.0 - paint) + 0.75 * paint
    blue = tone * (1.03 - paint) + 0.7 * paint
    return red, red, blue, 0.14 + 0.5 * paint + 0.1 * fine, 0.0


@inner
def _slab(world, solid, face, x, y, footprint):
    """A raised block: kerb stones, paved sidewalks along the streets, yards behind them (x and y of the street)."""
    look = world.look[solid]
    seed = int(look[11])
    if label_of(world, solid, x, y) == TERRAIN:
        tone = 0.55 + 0.9 * cloud_noise(0.8 * x, 0.8 * y, seed)
        return look[4] * tone, look[5] * tone, look[6] * tone, 0.5, 0.0
    kerb = abs(y) - world.street[0] < 0.18 or face != TOP
    tone = 0.85 + 0.3 * cloud_noise(0.7 * x, 0.7 * y, seed)
    if kerb:
        tone *= 1.25
    else:
        size = look[7]
        i, j = math.floor(x / size), math.floor(y / size)
        keep = _keep(size, footprint)
        tone *= 1.0 + 0.25 * (lattice(i, j, 0, seed) - 0.5) * keep
        if (x / size - i) * size < 0.03 or (y / size - j) * size < 0.03:
            tone *= 1.0 - 0.45 * keep
    return look[1] * tone, look[2] * tone, look[3] * tone, look[12], 0.0


@inner
def _wall(look, u, v, footprint):
    """Bricks or plaster at u along and v above the foot of a wall."""
    seed = int(look[11])
    tone = 0.8 + 0.4 * cloud_noise(0.45 * u, 0.25 * v, seed) - 0.12 * max(0.0, 1.0 - v)
    if look[10] > 0.5:
        row = math.floor(v / 0.12)
        shift = 0.5 * (row % 2)
        column = math.floor(u / 0.36 + shift)
        keep = _keep(0.24, footprint)
        tone *= 1.0 + 0.35 * (lattice(column, row, 1, seed) - 0.5) * keep
        if v / 0.12 - row < 0.14 or u / 0.36 + shift - column < 0.06:
            tone *= 1.0 - 0.3 * keep
    return tone


@inner
def _facade(look, shape, face, x, y, z, footprint):
    """Floors of windows; parameters: height of a floor, distance of windows, their width / distance, bricks (1) or not.

    The place of the gloss says whether the ground floor has shops (1) or not (0).
    """
    seed = int(look[11])
    v = z + shape[7]
    if face in (TOP, BOTTOM):
        tone = 0.6 + 0.3 * value_noise(x, y, seed)
        return 0.3 * tone, 0.28 * tone, 0.27 * tone, 0.3, 0.0
    along_x = face in (LEFT, RIGHT)
    u = x + shape[5] if along_x else y + shape[6]
    width = 2.0 * (shape[5] if along_x else shape[6])
    height = 2.0 * shape[7]
    tone = _wall(look, u, v, footprint)
    red, green, blue = look[1] * tone, look[2] * tone, look[3] * tone
    floor_height, pitch = look[7], look[8]
    columns = max(math.floor((width - 0.8) / pitch), 1)
    fu = (u - 0.5 * (width - columns * pitch)) / pitch
    fv = v / floor_height
    column, row = math.floor(fu), math.floor(fv)
    fu, fv = fu - column, fv - row
    if height - v < 0.45:
        return look[4], look[5], look[6], 0.45, 0.0
    shops = look[13] > 0.5 and row == 0
    if column < 0 or column >= columns or (row + 1) * floor_height > height - 0.3:
        return red, green, blue, look[12], 0.0
    low, high, share = 0.27, 0.78, look[9]
    if shops:
        low, high, share = 0.1, 0.68, 0.88
        if fv > 0.74:
            sign = column // 3
            hue = lattice(sign, face, 7, seed)
            dark = 0.15 + 0.6 * lattice(sign, face, 8, seed)
            return dark * (0.3 + 0.7 * hue), dark * abs(1.0 - 1.6 * hue), dark * (1.0 - hue), 0.4, 0.1
    aside = abs(fu - 0.5)
    keep = _keep(pitch * share, footprint)
    window = 1.0 if aside < 0.5 * share and low < fv < high else 0.0
    frame = window == 0.0 and aside < 0.5 * share + 0.05 and low - 0.03 < fv < high + 0.03
    window = window * keep + (high - low) * share * (1.0 - keep)
    if frame:
        red, green, blue = look[4], look[5], look[6]
    draw = lattice(column, row, face, seed)
    inside = 0.03 + 0.06 * draw if draw < 0.7 else 0.35 * draw
    if draw > 0.45 and fv > high - 0.22 * draw and not shops:
        inside = 0.4
    bar = abs(aside) < 0.02 or abs(fv - 0.58) < 0.012
    if bar and not shops:
        inside = inside * (1.0 - keep) + look[4] * keep
    red, green = red * (1.0 - window) + inside * window, green * (1.0 - window) + 1.04 * inside * window
    blue = blue * (1.0 - window) + 1.12 * inside * window
    return red, green, blue, look[12] * (1.0 - 0.75 * window), 0.3 * window


@inner
def _vehicle_end(face, side, height):
    """Lights, grille and number plate; `side` is |y|, `height` is above the floor, both in shares of the body."""
    if _between(side, 0.62, 0.95) and _between(height, 0.5, 0.82):
        return (0.85, 0.85, 0.8, 0.9, 0.4) if face == FRONT else (0.45, 0.02, 0.02, 0.9, 0.2)
    if side < 0.27 and _between(height, 0.2, 0.36):
        return 0.75, 0.75, 0.7, 0.95, 0.0
    if face == FRONT and side < 0.55 and _between(height, 0.4, 0.66):
        return 0.02, 0.02, 0.022, 0.1, 0.2
    if height < 0.14:
        return 0.03, 0.03, 0.03, 0.08, 0.0
    return -1.0, 0.0, 0.0, 0.0, 0.0


@inner
def _paint(look, shape, face, x, y, z, footprint):
    """Body of a car or van; parameters: x of the front and rear axle, radius of a wheel, and for
    vans 1 + where the side windows begin, as a share of the half length (0: no windows)."""
    height = (z + shape[7]) / (2.0 * shape[7])
    above_road = z + shape[2]
    if face in (LEFT, RIGHT):
        for axle in (look[7], look[8]):
            if (x - axle) ** 2 + (above_road - look[9]) ** 2 < (1.18 * look[9]) ** 2:
                return 0.012, 0.012, 0.012, 0.05, 0.0
        if height < 0.13:
            return 0.03, 0.03, 0.03, 0.08, 0.0
        keep = _keep(0.08, footprint)
        if min(abs(x - 0.06 * shape[5]), abs(x + 0.5 * shape[5])) < 0.014 and height < 0.95:
            return look[1] * (1 - 0.6 * keep), look[2] * (1 - 0.6 * keep), look[3] * (1 - 0.6 * keep), look[12], 0.1
        if look[10] > 0.0 and _between(height, 0.56, 0.88) and _between(x / shape[5], look[10] - 1.0, 0.8):
            return 0.02, 0.022, 0.025, 0.05, 0.7
    elif face in (FRONT, BACK):
        side = abs(y) / shape[6]
        if look[10] > 0.0 and _between(height, 0.55, 0.9) and side < 0.86:
            return 0.02, 0.022, 0.025, 0.05, 0.7
        scale = 0.6 if look[10] > 0.0 else 1.0
        red, green, blue, reflectivity, gloss = _vehicle_end(face, side, height / scale)
        if red >= 0.0:
            return red, green, blue, reflectivity, gloss
    return look[1], look[2], look[3], look[12], look[13]


@inner
def _cabin(look, shape, face, x, y, z):
    """Roof, pillars and panes."""
    up = z + shape[7]
    height = up / (2.0 * shape[7])
    glass = False
    if face in (FRONT, BACK):
        glass = abs(y) < 0.88 * (shape[6] - shape[10] * up) and _between(height, 0.06, 0.9)
    elif face in (LEFT, RIGHT):
        rear, front = -shape[5] + shape[9] * up, shape[5] - shape[8] * up
        share = (x - rear) / (front - rear)
        glass = _between(height, 0.08, 0.86) and _between(share, 0.07, 0.93) and abs(share - 0.52) > 0.025
    if glass:
        return 0.02, 0.022, 0.025, 0.05, 0.75
    return look[1], look[2], look[3], look[12], look[13]


@inner
def _wheel(look, shape, x, z):
    """A tyre with a rim of five spokes."""
    radius = math.hypot(x, z) / shape[5]
    if radius < 0.62:
        spoke = math.cos(5.0 * math.atan2(z, x))
        if radius < 0.2 or spoke > -0.1 or radius > 0.54:
            return look[4], look[5], look[6], 0.35, 0.3
    return look[1], look[2], look[3], 0.06, 0.0


@inner
def _leaves(look, x, y, z, footprint):
    """Light and dark leaves, and a slow change of tone over the crown."""
    seed = int(look[11])
    cell = lattice(math.floor(x / 0.11), math.floor(y / 0.11), math.floor(z / 0.11), seed)
    clump = value_noise(1.7 * (x + 0.6 * z), 1.7 * (y - 0.5 * z), seed + 2)
    tone = 0.35 + 0.9 * clump + 0.7 * (cell - 0.5) * _keep(0.22, footprint)
    mix = clump * clump
    red = (look[1] * (1 - mix) + look[4] * mix) * tone
    green = (look[2] * (1 - mix) + look[5] * mix) * tone
    return red, green, (look[3] * (1 - mix) + look[6] * mix) * tone, look[12] * (0.7 + 0.5 * cell), 0.0


@inner
def solid_texture(world, solid, face, x, y, z, street_x, street_y, footprint):
    """Colour, reflectivity and gloss of a solid at (x, y, z) of its own frame, (street_x, street_y) of the street."""
    look, shape = world.look[solid], world.shape[solid]
    texture = int(look[0])
    if texture == SLAB:
        return _slab(world, solid, face, street_x, street_y, footprint)
    if texture == FACADE:
        return _facade(look, shape, face, x, y, z, footprint)
    if texture == PAINT:
        return _paint(look, shape, face, x, y, z, footprint)
    if texture == CABIN:
        return _cabin(look, shape, face, x, y, z)
    if texture == WHEEL and world.kind[solid] == CYL_Y and (face in (LEFT, RIGHT)):
        return _wheel(look, shape, x, z)
    if texture == LEAVES:
        return _leaves(look, x, y, z, footprint)
    if texture == PLATE and (face in (FRONT, BACK)):
        rim = max(abs(y) / shape[6], abs(z) / shape[7])
        if rim > 0.8 or (look[7] > 0.5 and abs(z) < 0.22 * shape[7]):
            return look[4], look[5], look[6], look[12], 0.0
    if texture == CLOTH:
        tone = 0.8 + 0.4 * value_noise(9.0 * (x + y), 9.0 * z, int(look[11]))
        return look[1] * tone, look[2] * tone, look[3] * tone, look[12], 0.0
    return look[1], look[2], look[3], look[12], look[13]
