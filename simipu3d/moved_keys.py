"""Where did a key of an earlier version go? Files that people write are refused with the new place; what an earlier version
wrote itself (a run's resolved configuration) is brought up to date without a word."""

from copy import deepcopy
from typing import Any

from simipu3d.errors import UserError

GONE = {"load_boxes", "load_ground_truth"}
"""Keys of `data:` that said what to read; a method says that now."""

_IMAGE_KEYS = ("images", "joint_flip")


def refuse_moved_keys(raw: dict[str, Any], source: str) -> None:
    """Raise `UserError` where a configuration uses a key at its old place."""
    data, matching = raw.get("data"), raw.get("matching")
    if isinstance(matching, dict) and "map" in matching:
        raise UserError(f"{source}: matching.map: this key is now image_encoder.map")
    if not isinstance(data, dict):
        return
    if "augment" in data:
        raise UserError(
            f"{source}: data.augment: this block is now augment: at the top level, with the keys of point clouds in "
            "augment.points and those of images in augment.images"
        )
    for key in sorted(GONE & data.keys()):
        raise UserError(
            f"{source}: data.{key}: this key is gone, ground truth is read when the method needs it; leave it out"
        )
    for number, entry in enumerate(data["sets"] if isinstance(data.get("sets"), list) else []):
        augment = entry.get("augment") if isinstance(entry, dict) else None
        if isinstance(augment, dict) and augment.keys() - {"points", *_IMAGE_KEYS}:
            wrong = ", ".join(sorted(augment.keys() - {"points", *_IMAGE_KEYS}))
            raise UserError(
                f"{source}: data.sets.{number}.augment: {wrong} stand in augment.points now, as in augment:"
            )


def upgrade(resolved: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration of any earlier version, in today's layout; today's own comes back equal."""
    raw = deepcopy(resolved)
    data, matching = raw.get("data"), raw.get("matching")
    if isinstance(matching, dict) and "map" in matching and isinstance(raw.get("image_encoder"), dict):
        raw["image_encoder"].setdefault("map", matching.pop("map"))
    if isinstance(data, dict):
        for key in GONE:
            data.pop(key, None)
        if isinstance(data.get("augment"), dict):
            raw["augment"] = _with_open_centres(_nested(data.pop("augment")), data.get("point_range"))
        for entry in data["sets"] if isinstance(data.get("sets"), list) else []:
            if isinstance(entry, dict):
                for key in GONE:
                    entry.pop(key, None)
                if isinstance(entry.get("augment"), dict):
                    entry["augment"] = _nested(entry["augment"])
    return raw


def _with_open_centres(augment: dict[str, Any], point_range: Any) -> dict[str, Any]:
    """The same with null for a centre that null means too: version 0.1 wrote the middle of KITTI's range out."""
    if (
        not isinstance(point_range, list | tuple)
        or len(point_range) != 6
        or not isinstance(augment.get("points"), dict)
    ):
        return augment
    middle = [(low + high) / 2 for low, high in zip(point_range[:3], point_range[3:], strict=True)]
    centres = ("rotation_centre", "scale_centre")
    given = {key: augment["points"].get(key) for key in centres}
    opened = {key: None for key, centre in given.items() if isinstance(centre, list | tuple) and list(centre) == middle}
    return {**augment, "points": {**augment["points"], **opened}}


def _nested(augment: dict[str, Any]) -> dict[str, Any]:
    """The flat block of version 0.1 with its point keys under `points`."""
    if "points" in augment:
        return augment
    points = {key: value for key, value in augment.items() if key not in _IMAGE_KEYS}
    rest = {key: augment[key] for key in _IMAGE_KEYS if key in augment}
    return {**({"points": points} if points else {}), **rest}
