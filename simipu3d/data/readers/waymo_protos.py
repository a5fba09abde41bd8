"""How are the bytes of a Waymo v1 record read and written without TensorFlow and without Waymo's package?

`FIELDS` lists the messages and fields that are used here, by the numbers that Waymo's format gives them; the classes are
built from it at run time in a pool of their own, so that nothing meets the original definitions where a process has
loaded those too. What the table leaves out is skipped when it is read.

The table says less than the original where that is enough: an enumeration is an int32, and the packed numbers of a
range image are bytes, which look the same in the file; numpy takes them from there at once.

Source of the numbers: Waymo Open Dataset, dataset.proto, label.proto and metrics.proto; of the encoding: Protocol Buffers,
"Encoding".
"""

import functools
import zlib

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

FIELDS: dict[str, dict[str, tuple[int, str]]] = {
    "Frame": {
        "context": (1, "Context"),
        "timestamp_micros": (2, "int64"),
        "pose": (3, "Transform"),
        "images": (4, "CameraImage[]"),
        "lasers": (5, "Laser[]"),
        "laser_labels": (6, "Label[]"),
        "no_label_zones": (7, "Polygon[]"),
        "camera_labels": (8, "CameraLabels[]"),
        "projected_lidar_labels": (9, "CameraLabels[]"),
    },
    # Names and ids are text; as bytes they cannot upset the parser before their own reader has looked at them.
    "Context": {
        "name": (1, "bytes"),
        "camera_calibrations": (2, "CameraCalibration[]"),
        "laser_calibrations": (3, "LaserCalibration[]"),
        "stats": (4, "Stats"),
    },
    "Stats": {
        "laser_object_counts": (1, "ObjectCount[]"),
        "time_of_day": (2, "string"),
        "location": (3, "string"),
        "weather": (4, "string"),
        "camera_object_counts": (5, "ObjectCount[]"),
    },
    "ObjectCount": {"type": (1, "int32"), "count": (2, "int32")},
    "CameraCalibration": {
        "name": (1, "int32"),
        "intrinsic": (2, "double[]"),
        "extrinsic": (3, "Transform"),
        "width": (4, "int32"),
        "height": (5, "int32"),
        "rolling_shutter_direction": (6, "int32"),
    },
    "LaserCalibration": {
        "name": (1, "int32"),
        "beam_inclinations": (2, "double[]"),
        "beam_inclination_min": (3, "double"),
        "beam_inclination_max": (4, "double"),
        "extrinsic": (5, "Transform"),
    },
    "Transform": {"transform": (1, "double[]")},
    "CameraImage": {
        "name": (1, "int32"),
        "image": (2, "bytes"),
        "pose": (3, "Transform"),
        "velocity": (4, "Velocity"),
        "pose_timestamp": (5, "double"),
        "shutter": (6, "double"),
        "camera_trigger_time": (7, "double"),
        "camera_readout_done_time": (8, "double"),
    },
    "Velocity": {
        "v_x": (1, "float"),
        "v_y": (2, "float"),
        "v_z": (3, "float"),
        "w_x": (4, "double"),
        "w_y": (5, "double"),
        "w_z": (6, "double"),
    },
    "Laser": {"name": (1, "int32"), "ri_return1": (2, "RangeImage"), "ri_return2": (3, "RangeImage")},
    # range_image stands in the oldest files only, in place of the compressed one.
    "RangeImage": {
        "range_image": (1, "Matrix"),
        "range_image_compressed": (2, "bytes"),
        "camera_projection_compressed": (3, "bytes"),
        "range_image_pose_compressed": (4, "bytes"),
    },
    # Stands for MatrixFloat and MatrixInt32. A writer may split packed numbers into several pieces, hence the list.
    "Matrix": {"data": (1, "bytes[]"), "shape": (2, "MatrixShape")},
    "MatrixShape": {"dims": (1, "int32[]")},
    "CameraLabels": {"name": (1, "int32"), "labels": (2, "Label[]")},
    "Label": {
        "box": (1, "Box"),
        "metadata": (2, "Metadata"),
        "type": (3, "int32"),
        "id": (4, "bytes"),
        "detection_difficulty_level": (5, "int32"),
        "tracking_difficulty_level": (6, "int32"),
        "num_lidar_points_in_box": (7, "int32"),
        "most_visible_camera_name": (11, "string"),
        "camera_synced_box": (12, "Box"),
        "num_top_lidar_points_in_box": (13, "int32"),
    },
    "Box": {
        "center_x": (1, "double"),
        "center_y": (2, "double"),
        "center_z": (3, "double"),
        "width": (4, "double"),
        "length": (5, "double"),
        "height": (6, "double"),
        "heading": (7, "double"),
    },
    "Metadata": {
        "speed_x": (1, "double"),
        "speed_y": (2, "double"),
        "accel_x": (3, "double"),
        "accel_y": (4, "double"),
        "speed_z": (5, "double"),
        "accel_z": (6, "double"),
    },
    "Polygon": {"x": (1, "double[]"), "y": (2, "double[]"), "id": (3, "string")},
    # Not part of a record: what detections are submitted and scored in.
    "Objects": {"objects": (1, "Object[]")},
    "Object": {
        "object": (1, "Label"),
        "score": (2, "float"),
        "overlap_with_nlz": (3, "bool"),
        "context_name": (4, "bytes"),
        "frame_timestamp_micros": (5, "int64"),
        "camera_name": (6, "int32"),
    },
}
"""Message -> field -> (number, type); `[]` marks a repeated field, every other one is optional (proto2)."""

MAX_MATRIX_BYTES = 1 << 28
"""A matrix that inflates to more is refused: the largest real one, of the top lidar, has 7 MB."""

_PACKAGE = "simipu3d.waymo"
_SCALARS = {
    "double": descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE,
    "float": descriptor_pb2.FieldDescriptorProto.TYPE_FLOAT,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "bytes": descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
}


class DamagedMatrixError(ValueError):
    """A compressed matrix cannot be read; its callers know which one."""


@functools.cache
def message_class(name: str) -> type[Message]:
    """The class of a message of `FIELDS`."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name="simipu3d/waymo.proto", package=_PACKAGE, syntax="proto2")
    for message_name, fields in FIELDS.items():
        message = file.message_type.add(name=message_name)
        for field_name, (number, type_name) in fields.items():
            field = message.field.add(name=field_name, number=number)
            repeated, type_name = type_name.endswith("[]"), type_name.removesuffix("[]")
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if type_name in _SCALARS:
                field.type = _SCALARS[type_name]
            else:
                field.type, field.type_name = field.TYPE_MESSAGE, f".{_PACKAGE}.{type_name}"
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return pool


def decode_matrix(compressed: bytes, dtype: type[np.float32] | type[np.int32], num_channels: int) -> NDArray:
    """A zlib-compressed matrix of a record.

    Args:
        compressed: the field's bytes.
        dtype: what the original calls MatrixFloat or MatrixInt32.
        num_channels: the last dimension that it must have.

    Returns:
        (H, W, num_channels) of `dtype`, H and W at least 1.

    Raises:
        DamagedMatrixError: the bytes are no zlib stream, are cut short, inflate beyond `MAX_MATRIX_BYTES`, or hold
            another number of values than their shape says.
    """
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(compressed, MAX_MATRIX_BYTES)
    except zlib.error as error:
        raise DamagedMatrixError(f"the compressed bytes are damaged ({error})") from error
    if not inflater.eof:
        limit = f"inflate to more than {MAX_MATRIX_BYTES >> 20} MB" if inflater.unconsumed_tail else "are cut short"
        raise DamagedMatrixError(f"the compressed bytes {limit}")
    try:
        matrix = message_class("Matrix").FromString(content)
    except DecodeError as error:
        raise DamagedMatrixError("the inflated bytes are no matrix") from error
    return matrix_values(matrix, dtype, num_channels)


def matrix_values(matrix: Message, dtype: type[np.float32] | type[np.int32], num_channels: int) -> NDArray:
    """The values of a `Matrix` message; arguments, result and errors as in `decode_matrix`."""
    data, shape = b"".join(matrix.data), tuple(matrix.shape.dims)
    if len(shape) != 3 or min(shape) < 1 or shape[2] != num_channels:
        raise DamagedMatrixError(f"its shape is {list(shape)}, and rows x columns x {num_channels} is what it must be")
    if dtype is np.int32:
        values = decode_varints(data)
    elif len(data) % 4 == 0:
        # A copy: the bytes are the message's, and little-endian on any machine.
        values = np.frombuffer(data, dtype="<f4").astype(np.float32)
    else:
        raise DamagedMatrixError(f"{len(data)} bytes are no whole number of float32 values")
    num_values = shape[0] * shape[1] * shape[2]
    if len(values) != num_values:
        raise DamagedMatrixError(f"it holds {len(values)} packed values, and its shape {list(shape)} says {num_values}")
    return values.reshape(shape)


def encode_matrix(values: NDArray) -> bytes:
    """The inverse of `decode_matrix` for (H, W, C) float32 or int32 values.

    Zlib's fastest level: on the noise of a sensor the slower ones gain little.
    """
    data = values.astype("<f4").tobytes() if values.dtype.kind == "f" else encode_varints(values.reshape(-1))
    matrix = message_class("Matrix")(data=[data], shape={"dims": values.shape})
    return zlib.compress(matrix.SerializeToString(), 1)


def decode_varints(data: bytes) -> NDArray[np.int32]:
    """(N,) int32 of packed variable-length integers: seven bits a byte, lowest first, the top bit set on all but the
    last byte of each. A negative number takes ten bytes, those of its 64-bit form; of these the lowest 32 bits count.

    Raises:
        DamagedMatrixError: the bytes end within a number, or one has more than ten bytes.
    """
    octets = np.frombuffer(data, dtype=np.uint8)
    if len(octets) == 0:
        return np.zeros(0, dtype=np.int32)
    ends = np.flatnonzero(octets < 0x80)
    if octets[-1] >= 0x80:
        raise DamagedMatrixError("its bytes end within an integer")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise DamagedMatrixError(f"one of its integers has {lengths.max()} bytes, and 10 is the most there can be")
    values = (octets[starts] & 0x7F).astype(np.uint32)
    # The fifth byte reaches bit 31; later ones lie above the 32 bits that count.
    for place in range(1, min(int(lengths.max()), 5)):
        rows = np.flatnonzero(lengths > place)
        values[rows] |= (octets[starts[rows] + place] & 0x7F).astype(np.uint32) << np.uint32(7 * place)
    return values.view(np.int32)


def encode_varints(values: NDArray[np.int32]) -> bytes:
    """The inverse of `decode_varints`."""
    wide = values.astype(np.int64).view(np.uint64)
    num_bits = max(int(wide.max(initial=0)).bit_length(), 1)
    pieces = (wide[:, None] >> np.arange(0, num_bits, 7, dtype=np.uint64)) & np.uint64(0x7F)
    # Which bytes are there: up to the highest one that is not zero, and always the first.
    kept = np.cumsum(pieces[:, ::-1], axis=1)[:, ::-1] > 0
    kept[:, 0] = True
    more = np.zeros_like(kept)
    more[:, :-1] = kept[:, 1:]
    return (pieces.astype(np.uint8) | more.astype(np.uint8) << 7)[kept].tobytes()
