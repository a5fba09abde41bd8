"""Waymo v1: records, messages and moments against their own inverse, bytes made by hand, and one real record."""

import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from simipu3d.benchmark.synthetic_waymo.record import moment_to_record
from simipu3d.contracts.frame import Boxes
from simipu3d.data.readers import waymo_protos
from simipu3d.data.readers.tfrecord import masked_crc, read_record, scan_records, write_records
from simipu3d.data.readers.waymo_moment import (
    CAMERA_NAMES,
    LASER_NAMES,
    OBJECT_NAMES,
    WaymoCamera,
    WaymoLaser,
    WaymoMoment,
    WaymoRequest,
    WaymoReturn,
)
from simipu3d.data.readers.waymo_protos import (
    DamagedMatrixError,
    decode_matrix,
    decode_varints,
    encode_matrix,
    encode_varints,
    message_class,
)
from simipu3d.data.readers.waymo_v1 import WaymoV1
from simipu3d.errors import BadFrameError, UserError

CAMERAS, LASERS = tuple(CAMERA_NAMES.values()), tuple(LASER_NAMES.values())
EVERYTHING = WaymoRequest(CAMERAS, LASERS, returns=2, projected_boxes=True, projections=True)
SEGMENT = "17065833287841703_2980_000_3000_000"


# ---- what is written


def random_pose(rng: np.random.Generator) -> np.ndarray:
    """(4, 4): a rotation about z, and a place in a city."""
    angle, pose = rng.uniform(-np.pi, np.pi), np.eye(4)
    pose[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    pose[:3, 3] = rng.uniform(-3e4, 3e4, 3)
    return pose


def random_laser(rng: np.random.Generator, name: str, num_returns: int = 2) -> WaymoLaser:
    height, width = rng.integers(1, 9), rng.integers(1, 30)
    returns = tuple(
        WaymoReturn(
            rng.normal(0, 50, (height, width, 4)).astype(np.float32),
            rng.integers(-3, 2000, (height, width, 6)).astype(np.int32),
        )
        for _ in range(num_returns)
    )
    return WaymoLaser(
        name=name,
        vehicle_from_laser=random_pose(rng),
        inclinations=np.sort(rng.uniform(-0.3, 0.1, height)) if name == "TOP" else None,
        inclination_range=(float(rng.uniform(-1.6, -0.3)), float(rng.uniform(0, 0.6))),
        returns=returns,
        pixel_pose=rng.normal(size=(height, width, 6)).astype(np.float32) if name == "TOP" else None,
    )


def random_camera(rng: np.random.Generator, name: str) -> WaymoCamera:
    posed = rng.random() < 0.8
    return WaymoCamera(
        name=name,
        jpeg=rng.bytes(rng.integers(1, 400)),
        intrinsic=rng.normal(0, 1000, 9),
        vehicle_from_camera=random_pose(rng),
        size=(int(rng.integers(1, 1281)), int(rng.integers(1, 1921))),
        world_from_vehicle=random_pose(rng) if posed else None,
        pose_timestamp=float(rng.uniform(1.5e9, 1.6e9)) if posed else None,
        labels=rng.uniform(0, 2000, (rng.integers(0, 4), 4)) if rng.random() < 0.7 else None,
    )


def random_moment(rng: np.random.Generator, timestamp: int = 1553735853462203, segment: str = SEGMENT) -> WaymoMoment:
    num_boxes = int(rng.integers(0, 6))
    velocity = rng.normal(0, 10, (num_boxes, 2))
    velocity[rng.random(num_boxes) < 0.3] = np.nan
    boxes = Boxes(
        center=rng.normal(0, 40, (num_boxes, 3)),
        size=rng.uniform(0.1, 12, (num_boxes, 3)),
        yaw=rng.uniform(-np.pi, np.pi, num_boxes),
        names=tuple(OBJECT_NAMES[int(kind)] for kind in rng.integers(0, 5, num_boxes)),
        velocity=velocity,
        num_points=rng.integers(0, 1000, num_boxes),
        difficulty=rng.integers(1, 3, num_boxes),
    )
    return WaymoMoment(
        source="made",
        segment=segment,
        timestamp_micros=timestamp,
        world_from_vehicle=random_pose(rng),
        lasers=tuple(random_laser(rng, name) for name in LASERS if rng.random() < 0.7),
        cameras=tuple(random_camera(rng, name) for name in CAMERAS if rng.random() < 0.7),
        boxes=boxes,
    )


def full_moment(seed: int = 0, **kwargs) -> WaymoMoment:
    """With every sensor."""
    rng = np.random.default_rng(seed)
    part = random_moment(rng, **kwargs)
    lasers = tuple(random_laser(rng, name) for name in LASERS)
    return WaymoMoment(
        part.source,
        part.segment,
        part.timestamp_micros,
        part.world_from_vehicle,
        lasers,
        tuple(random_camera(rng, name) for name in CAMERAS),
        part.boxes,
    )


def official(root: Path, segment: str = SEGMENT) -> Path:
    return root / f"segment-{segment}_with_camera_labels.tfrecord"


def source_of(root: Path, *messages, request: WaymoRequest = EVERYTHING) -> WaymoV1:
    """A folder of one file of Frame messages."""
    write_records(official(root), [message.SerializeToString() for message in messages])
    return WaymoV1(root, None, request)


def message_of(moment: WaymoMoment):
    return message_class("Frame").FromString(moment_to_record(moment))


def assert_same_array(one, other) -> None:
    if one is None or other is None:
        assert one is other
        return
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


def assert_same(one: WaymoMoment, other: WaymoMoment) -> None:
    """Every field but `source`; all bit for bit but velocities, which are turned into the world and back."""
    assert (one.segment, one.timestamp_micros) == (other.segment, other.timestamp_micros)
    assert_same_array(one.world_from_vehicle, other.world_from_vehicle)
    assert [laser.name for laser in one.lasers] == [laser.name for laser in other.lasers]
    for a, b in zip(one.lasers, other.lasers, strict=True):
        assert a.inclination_range == b.inclination_range
        assert len(a.returns) == len(b.returns)
        for field in ("vehicle_from_laser", "inclinations", "pixel_pose"):
            assert_same_array(getattr(a, field), getattr(b, field))
        for first, second in zip(a.returns, b.returns, strict=True):
            assert_same_array(first.image, second.image)
            assert_same_array(first.projection, second.projection)
    assert [camera.name for camera in one.cameras] == [camera.name for camera in other.cameras]
    for a, b in zip(one.cameras, other.cameras, strict=True):
        assert (a.jpeg, a.size, a.pose_timestamp) == (b.jpeg, b.size, b.pose_timestamp)
        for field in ("intrinsic", "vehicle_from_camera", "world_from_vehicle", "labels"):
            assert_same_array(getattr(a, field), getattr(b, field))
    assert tuple(one.boxes.names) == tuple(other.boxes.names)
    for field in ("center", "size", "yaw", "num_points", "difficulty"):
        assert_same_array(getattr(one.boxes, field), getattr(other.boxes, field))
    np.testing.assert_allclose(one.boxes.velocity, other.boxes.velocity, rtol=0, atol=1e-12)


# ---- records


def test_checksum_of_a_published_example():
    """RFC 3720 B.4: 32 zero bytes have the CRC-32C 0x8a9136aa."""
    crc = 0x8A9136AA
    assert masked_crc(bytes(32)) == (((crc >> 15) | (crc << 17)) % 2**32 + 0xA282EAD8) % 2**32


@pytest.mark.parametrize("seed", range(5))
def test_records_come_back(tmp_path, seed):
    rng = np.random.default_rng(seed)
    records = [rng.bytes(int(size)) for size in rng.integers(0, 3000, rng.integers(1, 20))]
    path = tmp_path / "a.tfrecord"
    write_records(path, records)
    offsets, heads = scan_records(path, 100)
    assert [read_record(path, int(offset), number) for number, offset in enumerate(offsets)] == records
    assert heads == [record[:100] for record in records]
    assert os.listdir(tmp_path) == ["a.tfrecord"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    def broken():
        yield b"one"
        raise RuntimeError("the drive stops")

    path = tmp_path / "a.tfrecord"
    with pytest.raises(RuntimeError, match="the drive stops"):
        write_records(path, broken())
    assert os.listdir(tmp_path) == []
    with pytest.raises(UserError, match=r"gone/a.tfrecord: cannot be written \(No such file or directory\)"):
        write_records(tmp_path / "gone" / "a.tfrecord", [b"one"])


def read_all(path: Path) -> list[bytes]:
    return [read_record(path, int(offset), number) for number, offset in enumerate(scan_records(path)[0])]


def test_every_flipped_bit_is_found(tmp_path):
    """In the length, its checksum, the data and their checksum: one line that names file, record and byte."""
    path = tmp_path / "a.tfrecord"
    write_records(path, [b"first record", b"second"])
    whole = path.read_bytes()
    second = 12 + len(b"first record") + 4
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(UserError) as caught:
                read_all(path)
            number, start = (1, second) if place >= second else (0, 0)
            assert str(caught.value).startswith(f"{path}: record {number} at byte {start}: its ")
            in_data = place - start >= 12
            assert isinstance(caught.value, BadFrameError) == in_data
            assert "\n" not in str(caught.value)
            assert "download the file again" in str(caught.value)


def test_a_file_that_is_cut_anywhere_is_one_line(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_records(path, [b"first record", b"second"])
    whole, second = path.read_bytes(), 12 + len(b"first record") + 4
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        if size == second:
            assert read_all(path) == [b"first record"]  # a cut between records leaves a shorter, sound file
            continue
        with pytest.raises(UserError) as caught:
            read_all(path)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{path}: ")
        if size:
            assert re.search(rf"record {int(size > second)} at byte {second * (size > second)}: the file ends", message)
        else:
            assert "the file is empty" in message


def test_an_absurd_length_reserves_no_memory(tmp_path):
    path = tmp_path / "a.tfrecord"
    length = struct.pack("<Q", 2**62)
    path.write_bytes(length + struct.pack("<I", masked_crc(length)) + b"data")
    with pytest.raises(UserError, match=rf"record 0 at byte 0: the file ends {2**62} bytes before its end"):
        scan_records(path)
    with pytest.raises(BadFrameError, match=r"record 0 at byte 0: the file ends"):
        read_record(path, 0, 0)


def test_a_file_that_shrinks_after_the_scan_is_a_bad_frame(tmp_path):
    path = tmp_path / "a.tfrecord"
    write_records(path, [b"first record", b"second"])
    offset = int(scan_records(path)[0][1])
    os.truncate(path, offset)
    with pytest.raises(BadFrameError, match=rf"record 1 at byte {offset}: the file ends 0 bytes into it"):
        read_record(path, offset, 1)
    path.unlink()
    with pytest.raises(BadFrameError, match="No such file"):
        read_record(path, offset, 1)


# ---- numbers


def test_varints_by_hand():
    """300 = 0b10_0101100: low seven bits first, the top bit says that more follow. -1 is 2^64 - 1 in ten bytes."""
    by_hand = {0: b"\x00", 1: b"\x01", 127: b"\x7f", 128: b"\x80\x01", 300: b"\xac\x02", -1: b"\xff" * 9 + b"\x01"}
    by_hand |= {2**31 - 1: b"\xff\xff\xff\xff\x07", -(2**31): b"\x80\x80\x80\x80\xf8" + b"\xff" * 4 + b"\x01"}
    for value, octets in by_hand.items():
        assert decode_varints(octets).tolist() == [value]
        assert encode_varints(np.array([value], dtype=np.int32)) == octets
    assert decode_varints(b"".join(by_hand.values())).tolist() == list(by_hand)
    assert decode_varints(b"\x85\x80\x80\x00").tolist() == [5]  # longer than need be, and legal
    assert decode_varints(b"").shape == (0,)
    assert encode_varints(np.zeros(0, dtype=np.int32)) == b""


def slow_varints(octets: bytes) -> list[int]:
    """One byte after the other, as the format's description goes."""
    values, value, place = [], 0, 0
    for octet in octets:
        value, place = value | (octet & 0x7F) << place, place + 7
        if octet < 0x80:
            value &= 2**32 - 1
            values.append(value - 2**32 if value >= 2**31 else value)
            value, place = 0, 0
    return values


@pytest.mark.parametrize("seed", range(5))
def test_varints_come_back_and_equal_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    values = (rng.integers(-(2**31), 2**31, 500) >> rng.integers(0, 32, 500)).astype(np.int32)
    octets = encode_varints(values)
    assert slow_varints(octets) == values.tolist() == decode_varints(octets).tolist()


def original_matrix(kind: int, values: np.ndarray, packed: bool = True):
    """The message as the original declares it: numbers, and not bytes."""
    file = descriptor_pb2.FileDescriptorProto(name="matrix.proto", package="original", syntax="proto2")
    shape = file.message_type.add(name="MatrixShape")
    shape.field.add(name="dims", number=1, type=5, label=3)
    matrix = file.message_type.add(name="Matrix")
    matrix.field.add(name="data", number=1, type=kind, label=3).options.packed = packed
    matrix.field.add(name="shape", number=2, type=11, label=1, type_name=".original.MatrixShape")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("original.Matrix"))
    return made(data=values.reshape(-1).tolist(), shape={"dims": values.shape})


@pytest.mark.parametrize(("kind", "dtype"), [(2, np.float32), (5, np.int32)])
def test_matrices_are_those_of_the_original_declaration(kind, dtype):
    """Both ways: what Google's own packing writes is read, and what is written here it reads."""
    values = (np.random.default_rng(0).normal(0, 1e4, (7, 11, 6))).astype(dtype)
    original = original_matrix(kind, values)
    read = decode_matrix(zlib.compress(original.SerializeToString()), dtype, 6)
    assert_same_array(read, values)
    written = type(original).FromString(zlib.decompress(encode_matrix(values)))
    assert written == original


def test_a_matrix_by_hand():
    """Field 1, length-delimited: 0x0a; field 2: 0x12, with its own field 1 as single numbers 0x08. Pieces are joined."""
    floats = struct.pack("<8f", *range(8))
    content = b"\x0a\x14" + floats[:20] + b"\x12\x06\x08\x01\x08\x02\x08\x04" + b"\x0a\x0c" + floats[20:]
    matrix = decode_matrix(zlib.compress(content), np.float32, 4)
    assert matrix.tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]]]
    content = b"\x0a\x07\x01\xac\x02\x00\x00\x80\x01" + b"\x12\x05\x0a\x03\x01\x01\x05"  # dims packed: legal too
    assert decode_matrix(zlib.compress(content), np.int32, 5).tolist() == [[[1, 300, 0, 0, 128]]]


@pytest.mark.parametrize(
    ("content", "dtype", "message"),
    [
        (
            zlib.compress(b"\x0a\x04\0\0\0\0\x12\x06\x08\x01\x08\x01\x08\x04"),
            np.float32,
            "holds 1 packed values, and.* 4",
        ),
        (zlib.compress(b"\x0a\x03\0\0\0\x12\x06\x08\x01\x08\x01\x08\x04"), np.float32, "3 bytes are no whole number"),
        (zlib.compress(b"\x0a\x04\0\0\0\0"), np.float32, r"its shape is \[\]"),
        (zlib.compress(b"\x12\x06\x08\x00\x08\x00\x08\x04"), np.float32, r"its shape is \[0, 0, 4\]"),
        (zlib.compress(b"\x0a\x02\x01\x80\x12\x06\x08\x01\x08\x01\x08\x04"), np.int32, "end within an integer"),
        (zlib.compress(b"\x0a\x0b" + b"\x80" * 10 + b"\x00\x12\x06\x08\x01\x08\x01\x08\x04"), np.int32, "has 11 bytes"),
        (
            zlib.compress(original_matrix(2, np.zeros((1, 1, 4)), packed=False).SerializeToString()),
            np.float32,
            "holds 0",
        ),
        (zlib.compress(b"\xff" * 20), np.float32, "the inflated bytes are no matrix"),
        (b"no zlib stream", np.float32, "the compressed bytes are damaged"),
        (zlib.compress(bytes(1000))[:-5], np.float32, "the compressed bytes are cut short"),
    ],
)
def test_a_damaged_matrix_says_what_is_wrong(content, dtype, message):
    with pytest.raises(DamagedMatrixError, match=message):
        decode_matrix(content, dtype, 4)


def test_a_matrix_that_inflates_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(waymo_protos, "MAX_MATRIX_BYTES", 1 << 20)
    with pytest.raises(DamagedMatrixError, match="inflate to more than 1 MB"):
        decode_matrix(zlib.compress(bytes(2 << 20)), np.float32, 4)


# ---- a record made by hand


def piece(number: int, *content: bytes | float | int) -> bytes:
    """One field as the format's description has it: key, then bytes with their length, a double, or a small integer."""
    if all(isinstance(part, bytes) for part in content):
        joined = b"".join(content)
        return varint(number << 3 | 2) + varint(len(joined)) + joined
    (value,) = content
    if isinstance(value, float):
        return varint(number << 3 | 1) + struct.pack("<d", value)
    return varint(number << 3) + varint(value)


def varint(value: int) -> bytes:
    octets = b""
    while value > 0x7F:
        octets += bytes([value & 0x7F | 0x80])
        value >>= 7
    return octets + bytes([value])


def transform_by_hand(x: float) -> bytes:
    return b"".join(piece(1, float(value)) for value in (1, 0, 0, x, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1))


def matrix_by_hand(kind: str, *values: float) -> bytes:
    """1 x 1 x C, compressed."""
    data = struct.pack(f"<{len(values)}f", *values) if kind == "f" else b"".join(varint(value) for value in values)
    return zlib.compress(piece(1, data) + piece(2, piece(1, 1), piece(1, 1), piece(1, len(values))))


def test_a_record_by_hand(tmp_path):
    """The numbers of the fields, those too that the real record does not have: range images and vertical speeds."""
    calibration = piece(1, 1) + piece(2, 0.25) + piece(3, -0.3) + piece(4, 0.5) + piece(5, transform_by_hand(1.5))
    first = piece(2, matrix_by_hand("f", 9, 8, 7, -1)) + piece(3, matrix_by_hand("i", 1, 300, 2, 0, 0, 0))
    first += piece(4, matrix_by_hand("f", 0.5, 1, 2, 3, 4, 5))
    second = piece(2, matrix_by_hand("f", 6, 5, 4, 1)) + piece(3, matrix_by_hand("i", 4, 1, 2, 5, 7, 500))
    box = b"".join(piece(number, float(number)) for number in (1, 2, 3, 4, 5, 6, 7))
    metadata = b"".join(piece(number, float(10 + number)) for number in (1, 2, 3, 4, 5, 6))
    label = piece(1, box) + piece(2, metadata) + piece(3, 4) + piece(4, b"id") + piece(5, 2) + piece(7, 42)
    tilted = piece(1, 1.0) + piece(1, 0.0) * 5 + piece(1, 1.0) + piece(1, 0.0) * 2 + piece(1, -1.0)  # world z is -y
    tilted += piece(1, 0.0) * 5 + piece(1, 1.0)
    record = piece(1, piece(1, b"by-hand"), piece(3, calibration)) + piece(2, 77) + piece(3, tilted)
    record += piece(5, piece(1, 1), piece(2, first), piece(3, second)) + piece(6, label)
    write_records(tmp_path / "a.tfrecord", [record])
    moment = WaymoV1(tmp_path, None, EVERYTHING).read(0)
    assert (moment.segment, moment.timestamp_micros, moment.cameras) == ("by-hand", 77, ())
    (laser,) = moment.lasers
    assert (laser.name, laser.inclination_range, laser.inclinations.tolist()) == ("TOP", (-0.3, 0.5), [0.25])
    assert laser.vehicle_from_laser[0].tolist() == [1, 0, 0, 1.5]
    assert laser.pixel_pose.tolist() == [[[0.5, 1, 2, 3, 4, 5]]]
    assert [part.image.tolist() for part in laser.returns] == [[[[9, 8, 7, -1]]], [[[6, 5, 4, 1]]]]
    assert laser.returns[0].projection.tolist() == [[[1, 300, 2, 0, 0, 0]]]
    assert laser.returns[1].projection.tolist() == [[[4, 1, 2, 5, 7, 500]]]
    boxes = moment.boxes
    assert (boxes.center.tolist(), boxes.size.tolist(), boxes.yaw.tolist()) == ([[1, 2, 3]], [[5, 4, 6]], [7])
    assert (boxes.names, boxes.num_points.tolist(), boxes.difficulty.tolist()) == (("CYCLIST",), [42], [2])
    assert boxes.velocity.tolist() == [[11, -15]]  # speed_z is field 5, between the accelerations


# ---- moments


@pytest.mark.parametrize("seed", range(20))
def test_a_moment_comes_back(tmp_path, seed):
    moment = random_moment(np.random.default_rng(seed))
    write_records(official(tmp_path), [moment_to_record(moment)])
    source = WaymoV1(tmp_path, None, EVERYTHING)
    assert source.moments == ((SEGMENT, 0),)
    assert_same(source.read(0), moment)


def test_only_what_is_asked_for_is_inflated(tmp_path, monkeypatch):
    moment = full_moment()
    write_records(official(tmp_path), [moment_to_record(moment)])
    inflated = []
    original = waymo_protos.decode_matrix
    monkeypatch.setattr(
        "simipu3d.data.readers.waymo_v1_frame.decode_matrix",
        lambda *args: inflated.append(args[1:]) or original(*args),
    )
    source = WaymoV1(tmp_path, None, WaymoRequest(("SIDE_LEFT",), ("REAR", "TOP"), boxes=False))
    read = source.read(0)
    assert inflated == [(np.float32, 4), (np.float32, 4), (np.float32, 6)]
    assert [laser.name for laser in read.lasers] == ["REAR", "TOP"]  # the order of the request
    assert [len(laser.returns) for laser in read.lasers] == [1, 1]
    assert read.lasers[0].returns[0].projection is None
    assert [(camera.name, camera.labels) for camera in read.cameras] == [("SIDE_LEFT", None)]
    assert read.boxes is None
    assert_same(source.read(0, EVERYTHING), moment)


def test_fields_that_are_not_known_are_skipped(tmp_path):
    """Map features (10), flow (RangeImage 5), segmentation labels and keypoints stand in real records too."""
    moment = full_moment()
    record = moment_to_record(moment)
    extra = b"\x52\x05hello" + b"\xa0\x3f\x07" + b"\xad\x3f\x00\x00\x00\x00"  # field 10; 1012 as integer; 1013, 4 bytes
    write_records(official(tmp_path), [record + extra])
    assert_same(WaymoV1(tmp_path, None, EVERYTHING).read(0), moment)
    # Before the context too, where the scan looks for the time.
    write_records(official(tmp_path), [extra + record])
    assert_same(WaymoV1(tmp_path, None, EVERYTHING).read(0), moment)


def test_the_oldest_files_hold_range_images_uncompressed(tmp_path):
    moment = full_moment()
    message = message_of(moment)
    for laser in message.lasers:
        for stored in (laser.ri_return1, laser.ri_return2):
            stored.range_image.MergeFromString(zlib.decompress(stored.range_image_compressed))
            stored.ClearField("range_image_compressed")
    assert_same(source_of(tmp_path, message).read(0), moment)
    message.lasers[0].ri_return1.range_image.shape.dims[1] += 1
    with pytest.raises(BadFrameError, match=r"record 0: lidar TOP, return 1: it holds \d+ packed values"):
        source_of(tmp_path, message).read(0)


def test_what_is_not_labelled_follows_from_the_points(tmp_path):
    """No difficulty: level 2 up to five points. No speed: NaN. A kind that nobody knows: UNKNOWN."""
    message = message_of(full_moment())
    del message.laser_labels[:]
    for num_points, level in ((5, 0), (6, 0), (5, 1), (6, 2)):
        label = message.laser_labels.add(type=7, num_lidar_points_in_box=num_points, detection_difficulty_level=level)
        label.box.length = 4.0
    boxes = source_of(tmp_path, message).read(0).boxes
    assert boxes.difficulty.tolist() == [2, 1, 1, 2]
    assert np.isnan(boxes.velocity).all()
    assert boxes.velocity.shape == (4, 2)
    assert set(boxes.names) == {"UNKNOWN"}
    assert boxes.size.tolist() == [[4, 0, 0]] * 4
    del message.laser_labels[:]
    assert len(source_of(tmp_path, message).read(0).boxes) == 0


def test_speeds_are_turned_from_the_world_into_the_vehicle(tmp_path):
    """A car that heads north, +y, and an object that moves north: straight ahead, +x."""
    message = message_of(full_moment())
    message.pose.transform[:] = [0, -1, 0, 100, 1, 0, 0, 200, 0, 0, 1, 30, 0, 0, 0, 1]
    del message.laser_labels[:]
    message.laser_labels.add(metadata={"speed_x": 0.0, "speed_y": 3.0})
    np.testing.assert_allclose(source_of(tmp_path, message).read(0).boxes.velocity, [[3, 0]], atol=1e-12)


def test_sensors_that_a_frame_lacks_are_left_out(tmp_path):
    message = message_of(full_moment())
    del message.images[2], message.lasers[1]
    message.images[0].image = b""
    message.lasers[0].ClearField("ri_return1")
    moment = source_of(tmp_path, message).read(0)
    assert [camera.name for camera in moment.cameras] == ["FRONT_LEFT", "SIDE_LEFT", "SIDE_RIGHT"]
    assert [laser.name for laser in moment.lasers] == ["SIDE_LEFT", "SIDE_RIGHT", "REAR"]


def other_size(message) -> None:
    message.lasers[0].ri_return2.range_image_compressed = encode_matrix(np.zeros((2, 40, 4), np.float32))


def wrong_channels(message) -> None:
    message.lasers[1].ri_return1.range_image_compressed = encode_matrix(np.zeros((2, 40, 6), np.float32))


def flipped(message) -> None:
    content = bytearray(message.lasers[1].ri_return2.range_image_compressed)
    content[-1] ^= 1
    message.lasers[1].ri_return2.range_image_compressed = bytes(content)


DAMAGES = {
    "flipped": (flipped, "lidar FRONT, return 2: the compressed bytes are damaged"),
    "other size": (other_size, "lidar TOP: its return 2 is 2 x 40, and its first range image"),
    "channels": (wrong_channels, r"lidar FRONT, return 1: its shape is \[2, 40, 6\], and rows x columns x 4"),
    "no return 2": (
        lambda message: message.lasers[2].ClearField("ri_return2"),
        "lidar SIDE_LEFT, return 2: has no range image; set data.returns=1",
    ),
    "no pose image": (
        lambda message: message.lasers[0].ri_return1.ClearField("range_image_pose_compressed"),
        "lidar TOP: has no pose image",
    ),
    "no projection": (
        lambda message: message.lasers[3].ri_return1.ClearField("camera_projection_compressed"),
        "lidar SIDE_RIGHT, return 1: has no camera projection",
    ),
    "beams": (
        lambda message: message.context.laser_calibrations[0].beam_inclinations.append(0.5),
        r"lidar TOP: has \d+ beam inclinations and \d+ rows",
    ),
    "no beams": (
        lambda message: message.context.laser_calibrations[1].ClearField("beam_inclination_min"),
        "lidar FRONT: has neither beam inclinations nor their range",
    ),
    "NaN beams": (
        lambda message: message.context.laser_calibrations[0].beam_inclinations.__setitem__(0, float("nan")),
        "lidar TOP: has beam inclinations that are NaN",
    ),
    "laser calibration": (
        lambda message: message.context.laser_calibrations.__delitem__(4),
        "lidar REAR: has a range image and no calibration",
    ),
    "camera calibration": (
        lambda message: message.context.camera_calibrations.__delitem__(4),
        "has an image of camera SIDE_RIGHT and no calibration",
    ),
    "intrinsic": (
        lambda message: message.context.camera_calibrations[0].intrinsic.pop(),
        "the calibration of camera FRONT is to be 9 finite numbers and a size, and has 8 numbers",
    ),
    "image size": (
        lambda message: message.context.camera_calibrations[0].ClearField("width"),
        r"and has 9 numbers and \d+ x 0 pixels",
    ),
    "extrinsic": (
        lambda message: message.context.camera_calibrations[1].extrinsic.transform.pop(),
        "the extrinsic of camera FRONT_LEFT is to be 16 finite numbers and has 15 values",
    ),
    "pose": (
        lambda message: message.pose.transform.__setitem__(3, float("inf")),
        "the vehicle's pose is to be 16 finite numbers and has NaN or infinity",
    ),
    "pose of zeros": (
        lambda message: message.pose.transform.__setitem__(slice(0, 16), [0.0] * 16),
        "the vehicle's pose is no rigid motion",
    ),
    "sheared extrinsic": (
        lambda message: message.context.camera_calibrations[1].extrinsic.transform.__setitem__(
            slice(0, 16), [1.0, 0.5, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]
        ),
        "the extrinsic of camera FRONT_LEFT is no rigid motion",
    ),
    "mirrored lidar": (
        lambda message: message.context.laser_calibrations[1].extrinsic.transform.__setitem__(
            slice(0, 16), [1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, -1, 0, 0, 0, 0, 1]
        ),
        "lidar FRONT: the extrinsic is no rigid motion",
    ),
    "no pose": (lambda message: message.ClearField("pose"), r"no frame of the Waymo perception.* \(it has no pose\)"),
    "twice": (lambda message: message.images.append(message.images[0]), "holds an image of FRONT twice"),
    "box": (
        lambda message: message.laser_labels.add(box={"center_x": float("nan")}),
        "a 3D box has no finite centre, size or heading",
    ),
    "name": (lambda message: message.context.ClearField("name"), "its context has no usable name"),
    "text": (lambda message: setattr(message.context, "name", b"\x00\xff"), "its context has no usable name"),
    "segment": (
        lambda message: setattr(message.context, "name", b"other"),
        "is a frame of segment other, and the file",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_frame_is_one_line(tmp_path, name):
    """It names file, record and part; the frame next to it can still be read."""
    damage, expected = DAMAGES[name]
    sound, message = message_of(full_moment(timestamp=1)), message_of(full_moment(timestamp=2))
    damage(message)
    source = source_of(tmp_path, sound, message)
    source.read(0)
    with pytest.raises(BadFrameError, match=expected) as caught:
        source.read(1)
    assert str(caught.value).startswith(f"{official(tmp_path)}: record 1: ")
    assert "\n" not in str(caught.value)


# ---- folders


def test_segments_and_their_frames_in_the_order_of_time(tmp_path):
    """Whatever the order of the records; the name of a file that is not official stands in its first record."""
    rng = np.random.default_rng(0)
    moments = {
        name: [random_moment(rng, timestamp=int(time), segment=name) for time in rng.permutation(9) + 1]
        for name in ("9_1_000_2_000", "10_1_000_2_000", "77_3_000_4_000")
    }
    paths = [official(tmp_path, "9_1_000_2_000"), tmp_path / "mine.tfrecord"]
    paths.append(tmp_path / "training_segment-77_3_000_4_000.tfrecord")
    for path, own in zip(paths, moments.values(), strict=True):
        write_records(path, [moment_to_record(moment) for moment in own])
    (tmp_path / "notes.txt").write_text("not read")
    assert WaymoV1.list_segments(tmp_path) == ("10_1_000_2_000", "77_3_000_4_000", "9_1_000_2_000")
    chosen = ("9_1_000_2_000", "10_1_000_2_000")
    source = WaymoV1(tmp_path, chosen, EVERYTHING)
    assert source.moments == tuple((name, position) for name in chosen for position in range(9))
    for index, (name, position) in enumerate(source.moments):
        in_order = sorted(moments[name], key=lambda moment: moment.timestamp_micros)
        assert_same(source.read(index), in_order[position])


def test_the_time_is_found_behind_other_fields(tmp_path):
    extra = b"\xa0\x3f\x7f" + b"\x52\x05hello"  # field 1012 as integer, field 10
    records = [extra + moment_to_record(full_moment(timestamp=time)) for time in (5, 3)]
    write_records(official(tmp_path), records)
    source = WaymoV1(tmp_path, None, EVERYTHING)
    assert [source.read(index).timestamp_micros for index in range(2)] == [3, 5]


def test_a_context_too_long_for_the_scan_keeps_the_order_of_the_file(tmp_path):
    messages = [message_of(full_moment(timestamp=time)) for time in (5, 3)]
    for message in messages:
        message.context.stats.location = "SF" * 10_000
    source = source_of(tmp_path, *messages)
    assert [source.read(index).timestamp_micros for index in range(2)] == [5, 3]


def test_a_frame_with_a_damaged_time_leaves_the_others_readable(tmp_path):
    """The scan compares no checksum of data: what it takes for a time may be anything."""
    records = [moment_to_record(full_moment(timestamp=time)) for time in (10, 11, 12)]
    path = official(tmp_path)
    write_records(path, records)
    content, second = bytearray(path.read_bytes()), int(scan_records(path)[0][1])
    place = content.index(b"\x10\x0b\x1a", second)
    for damage in (0x7F, 0x0C + 0x80, 0xFF, 0x00):
        damaged = content.copy()
        damaged[place + 1] = damage
        path.write_bytes(damaged)
        source = WaymoV1(tmp_path, None, EVERYTHING)
        times, errors = [], []
        for index in range(3):
            try:
                times.append(source.read(index).timestamp_micros)
            except BadFrameError as error:
                errors.append(str(error))
        assert times == [10, 12]
        assert f"record 1 at byte {second}: its {len(records[1])} bytes do not match" in errors[0]


def test_bad_folders_are_one_line(tmp_path):
    def message_for(segments=None) -> str:
        with pytest.raises(UserError) as caught:
            WaymoV1(tmp_path, segments, EVERYTHING)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    with pytest.raises(UserError, match=r"no such folder; set data\.root"):
        WaymoV1(tmp_path / "absent", None, EVERYTHING)
    assert "holds no .tfrecord file of Waymo v1; set data.root to the folder that" in message_for()
    (tmp_path / "training").mkdir()
    write_records(tmp_path / "training" / "a.tfrecord", [b"x"])
    assert message_for().endswith(f"set data.root={tmp_path / 'training'} and data.split=all")
    path = official(tmp_path)
    write_records(path, [moment_to_record(full_moment())])
    assert "holds segment 1_2 (1 of 2 segments are missing)" in message_for((SEGMENT, "1_2"))
    (tmp_path / "copy.tfrecord").write_bytes(path.read_bytes())
    assert f"holds segment {SEGMENT}, and so does copy.tfrecord" in message_for()
    (tmp_path / "copy.tfrecord").unlink()
    write_records(path, [moment_to_record(full_moment())] * 2)
    assert f"{path}: records 0 and 1 have the same time stamp" in message_for()
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: record 1 at byte " in message_for()
    path.write_bytes(b"")
    assert message_for().startswith(f"{path}: the file is empty")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"PK\x03\x04 a file of another kind", "is no uncompressed TFRecord"),
        (b"\x1f\x8b\x08\x00", "the file ends 4 bytes into it"),
    ],
)
def test_files_of_another_kind_are_one_line(tmp_path, content, expected):
    (tmp_path / "other.tfrecord").write_bytes(content)
    with pytest.raises(UserError, match=expected):
        WaymoV1.list_segments(tmp_path)


@pytest.mark.parametrize("record", [b"", b"\x0a\x07\x0a\x05hello", b"\xff\xff", b"\x2a\x03abc\x11" + bytes(8)])
def test_records_of_another_kind_are_one_line(tmp_path, record):
    """Nothing; a tf.train.Example; noise; something like a motion scenario."""
    write_records(tmp_path / "other.tfrecord", [record])
    with pytest.raises(UserError, match="is whole, but is no frame of the Waymo perception data set"):
        WaymoV1.list_segments(tmp_path)
    (tmp_path / "other.tfrecord").rename(official(tmp_path))
    with pytest.raises(BadFrameError, match=r"record 0: is whole, but is no frame"):
        WaymoV1(tmp_path, None, EVERYTHING).read(0)


# ---- the real record


REAL_SEGMENT = "1024360143612057520_3580_000_3600_000"


@pytest.fixture
def real(samples: Path) -> WaymoMoment:
    source = WaymoV1(samples / "waymo_v1", None, EVERYTHING)
    assert source.moments == ((REAL_SEGMENT, 0),)
    return source.read(0)


@pytest.fixture
def frame(samples: Path):
    """The message itself, with the fields that a moment leaves out."""
    path = samples / "waymo_v1" / "pvps_data_one_frame.tfrecord"
    return message_class("Frame").FromString(read_record(path, 0, 0))


def rows_of(samples: Path, component: str) -> list[dict]:
    """The rows of the same frame in v2, column names without their component."""
    table = pq.read_table(samples / "waymo_v2" / component / f"{REAL_SEGMENT}.parquet")
    names = [re.sub(r"^\[\w+\]\.", "", name) for name in table.column_names]
    return [dict(zip(names, row, strict=True)) for row in zip(*table.to_pydict().values(), strict=True)]


def columns(row: dict, prefix: str, fields: str) -> list:
    return [row[f"{prefix}.{field}"] for field in fields.split()]


def test_real_images_and_calibrations_equal_those_of_v2(samples, real, frame):
    images = {row["key.camera_name"]: row for row in rows_of(samples, "camera_image")}
    calibrations = {row["key.camera_name"]: row for row in rows_of(samples, "camera_calibration")}
    numbers = {name: number for number, name in CAMERA_NAMES.items()}
    stored = {image.name: image for image in frame.images}
    directions = {entry.name: entry.rolling_shutter_direction for entry in frame.context.camera_calibrations}
    assert [camera.name for camera in real.cameras] == list(CAMERAS)
    for camera in real.cameras:
        number = numbers[camera.name]
        image, calibration = images[number], calibrations[number]
        assert camera.jpeg == image["image"]
        assert camera.world_from_vehicle.reshape(-1).tolist() == image["pose.transform"]
        assert camera.pose_timestamp == image["pose_timestamp"]
        assert camera.intrinsic.tolist() == columns(calibration, "intrinsic", "f_u f_v c_u c_v k1 k2 p1 p2 k3")
        assert camera.vehicle_from_camera.reshape(-1).tolist() == calibration["extrinsic.transform"]
        assert camera.size == (calibration["height"], calibration["width"])
        assert directions[number] == calibration["rolling_shutter_direction"]
        velocity, own = stored[number].velocity, stored[number]
        assert [velocity.v_x, velocity.v_y, velocity.v_z] == columns(image, "velocity.linear_velocity", "x y z")
        assert [velocity.w_x, velocity.w_y, velocity.w_z] == columns(image, "velocity.angular_velocity", "x y z")
        assert [own.shutter, own.camera_trigger_time, own.camera_readout_done_time] == columns(
            image, "rolling_shutter_params", "shutter camera_trigger_time camera_readout_done_time"
        )


def test_real_pose_lidars_and_statistics_equal_those_of_v2(samples, real, frame):
    (pose,) = rows_of(samples, "vehicle_pose")
    assert (real.segment, real.timestamp_micros) == (
        pose["key.segment_context_name"],
        pose["key.frame_timestamp_micros"],
    )
    assert real.world_from_vehicle.reshape(-1).tolist() == pose["world_from_vehicle.transform"]
    assert len(frame.lasers) == 5
    assert real.lasers == ()  # five entries, all empty
    rows = {row["key.laser_name"]: row for row in rows_of(samples, "lidar_calibration")}
    assert len(rows) == len(frame.context.laser_calibrations) == 5
    for entry in frame.context.laser_calibrations:
        row = rows[entry.name]
        assert list(entry.extrinsic.transform) == row["extrinsic.transform"]
        assert list(entry.beam_inclinations) == (row["beam_inclination.values"] or [])
        assert entry.beam_inclination_min == row["beam_inclination.min"]
        assert entry.beam_inclination_max == row["beam_inclination.max"]
    (stats,) = rows_of(samples, "stats")
    own = frame.context.stats
    assert [own.time_of_day, own.location, own.weather] == [
        stats[name] for name in ("time_of_day", "location", "weather")
    ]
    for counts, name in ((own.laser_object_counts, "lidar"), (own.camera_object_counts, "camera")):
        assert [count.type for count in counts] == stats[f"{name}_object_counts.types"]
        assert [count.count for count in counts] == stats[f"{name}_object_counts.counts"]


def test_real_boxes_equal_those_of_v2(samples, real, frame):
    rows = {row["key.laser_object_id"]: row for row in rows_of(samples, "lidar_box")}
    boxes = real.boxes
    assert len(boxes) == len(rows) == 75
    rotation = real.world_from_vehicle[:3, :3]
    for index, label in enumerate(frame.laser_labels):
        row = rows[label.id.decode()]
        assert boxes.center[index].tolist() == columns(row, "box.center", "x y z")
        assert boxes.size[index].tolist() == columns(row, "box.size", "x y z")
        assert boxes.yaw[index] == row["box.heading"]
        assert boxes.names[index] == OBJECT_NAMES[row["type"]]
        assert boxes.num_points[index] == row["num_lidar_points_in_box"]
        assert label.num_top_lidar_points_in_box == (row["num_top_lidar_points_in_box"] or 0)
        assert label.tracking_difficulty_level == (row["difficulty_level.tracking"] or 0)
        assert boxes.difficulty[index] == (
            row["difficulty_level.detection"] or (2 if row["num_lidar_points_in_box"] <= 5 else 1)
        )
        speed = np.array([value or 0.0 for value in columns(row, "speed", "x y z")])
        np.testing.assert_allclose(boxes.velocity[index], (rotation.T @ speed)[:2], atol=1e-12)
        own = [label.metadata.accel_x, label.metadata.accel_y, label.metadata.accel_z]
        assert own == [value or 0.0 for value in columns(row, "acceleration", "x y z")]


def test_real_objects_move_the_way_they_head(real):
    """Those that move, in the vehicle frame: speeds along the world's axes would be off by the car's own heading."""
    speed = np.linalg.norm(real.boxes.velocity, axis=1)
    fast = speed > 1
    off = np.arctan2(real.boxes.velocity[:, 1], real.boxes.velocity[:, 0]) - real.boxes.yaw
    assert fast.sum() >= 10
    assert np.abs(np.angle(np.exp(1j * off[fast]))).max() < 0.1


def test_real_image_boxes_equal_those_of_v2(samples, real, frame):
    projected = rows_of(samples, "projected_lidar_box")
    assert sum(len(camera.labels) for camera in real.cameras) == len(projected) == 62
    for number, camera in zip(CAMERA_NAMES, real.cameras, strict=True):
        expected = [
            columns(row, "box.center", "x y") + columns(row, "box.size", "x y")
            for row in projected
            if row["key.camera_name"] == number
        ]
        assert sorted(camera.labels.tolist()) == sorted(expected)
    drawn = {
        (entry.name, label.id.decode()): [
            label.box.center_x,
            label.box.center_y,
            label.box.length,
            label.box.width,
            label.type,
        ]
        for entry in frame.camera_labels
        for label in entry.labels
    }
    expected = {
        (row["key.camera_name"], row["key.camera_object_id"]): columns(row, "box.center", "x y")
        + columns(row, "box.size", "x y")
        + [row["type"]]
        for row in rows_of(samples, "camera_box")
    }
    assert len(drawn) == 66
    assert drawn == expected


def test_the_real_record_comes_back(tmp_path, real):
    write_records(official(tmp_path, REAL_SEGMENT), [moment_to_record(real)])
    assert_same(WaymoV1(tmp_path, None, EVERYTHING).read(0), real)
