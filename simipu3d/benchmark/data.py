"""Readers and shards on one core: speed, where the time goes, memory.

Every row has a process of its own (one thread, files in the page cache after a first pass); the rounds go from row to row,
so that what else the machine does falls on all of them, and a figure is the median of its rounds. `decode` is the time to
decode the frame's image files once more from memory, `geometry` the rest of the reader's time (reading, calibration,
points), `augment` what the training draw adds. `growth` is what resident memory gained from the middle to the end of
all frames read, `peak` the most it held beyond what the process held before it opened the data set.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from simipu3d.benchmark.made_data import Case, write_made_data
from simipu3d.config import parse_block, parse_part
from simipu3d.contracts.frame import Frame
from simipu3d.contracts.method import Needs
from simipu3d.data.config import AugmentConfig, DataConfig
from simipu3d.data.loading.augment import augment_frame
from simipu3d.data.loading.loader import Augments, build_reader, wants_of
from simipu3d.data.loading.order import sample_seeds
from simipu3d.data.readers.files import decode_image
from simipu3d.registry import READERS

NEEDS = Needs(point_views=2, image_views=1)
"""What a row reads and draws: SimIPU's."""


def decode_again(frame: Frame) -> float:
    """Seconds to decode the frame's image files from memory; 0 where it has none."""
    start = time.perf_counter()
    for camera in frame.cameras:
        if camera.encoded is not None:
            decode_image(camera.encoded, camera.name)
    return time.perf_counter() - start


def megabytes(what: str) -> float:
    """A figure of this process's memory: VmRSS, what it holds now, or VmHWM, the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) * 1024 / 1e6


def serve(pipe: Connection, data: str, augment: str) -> None:
    """A row's process. A number received: read that many frames, send seconds a frame as (read, decode, augment). A
    negative one: read that many, send megabytes held (half-way, at the end, at most), and end."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the most it held is counted from here on
    before = megabytes("VmRSS")
    config = parse_part("data", READERS, json.loads(data))
    assert isinstance(config, DataConfig)
    reader = build_reader(config, wants_of(NEEDS))
    reader.prepare()
    augments = Augments(reader, config, parse_block("augment", AugmentConfig, json.loads(augment)))
    index = 0
    while (number := pipe.recv()) > 0:
        spent = [0.0, 0.0, 0.0]
        for _ in range(number):
            start = time.perf_counter()
            frame = reader[index % len(reader)]
            read = time.perf_counter()
            augment_frame(frame, augments.of(index % len(reader)), NEEDS, sample_seeds(0, 0, index))
            spent[2] += time.perf_counter() - read
            spent[0] += read - start
            spent[1] += decode_again(frame)
            index += 1
        pipe.send(tuple(seconds / number for seconds in spent))
    held = []
    for half in (-number // 2, -number - -number // 2):
        for _ in range(half):
            reader[index % len(reader)]
            index += 1
        held.append(megabytes("VmRSS"))
    pipe.send((*held, megabytes("VmHWM") - before))


def time_cases(cases: list[Case], rounds: int, frames: int, soak: int) -> list[dict[str, Any]]:
    """Rows of the table.

    Args:
        cases: what to read.
        rounds, frames: so many times so many frames of every case; one round more warms up.
        soak: frames that each case reads in the end, for its memory.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for case in cases:
        pipes[case.name], theirs = context.Pipe()
        context.Process(
            target=serve, args=(theirs, json.dumps(case.data), json.dumps(case.augment)), daemon=True
        ).start()
        theirs.close()
    answers: dict[str, list[tuple[float, float, float]]] = {case.name: [] for case in cases}
    for _ in range(rounds + 1):
        for case in cases:
            pipes[case.name].send(frames)
            answers[case.name].append(pipes[case.name].recv())
    rows = []
    medians = {name: [statistics.median(one) for one in zip(*own[1:], strict=True)] for name, own in answers.items()}
    for case in cases:
        pipes[case.name].send(-soak)
        half_way, end, peak = pipes[case.name].recv()
        read, decode, augment = medians[case.name]
        faster = "" if case.against is None else f"{medians[case.against][0] / read:.2f} x {case.against}"
        rows.append(
            {
                "case": case.name,
                "frames_per_s": 1 / read,
                "read_ms": 1e3 * read,
                "decode_ms": 1e3 * decode,
                "geometry_ms": 1e3 * (read - decode),
                "augment_ms": 1e3 * augment,
                "reading_speed": faster,
                "frames_read": soak,
                "peak_MB": peak,
                "growth_MB": end - half_way,
            }
        )
    return rows


def measure(samples: Path | None, quick: bool) -> list[dict[str, Any]]:
    """All rows: synthetic data always, the real samples where there are some.

    Args:
        samples: folder with kitti/ and nuscenes/ in their official layouts, or None.
        quick: one short round of small frames; only shows that everything runs.
    """
    with tempfile.TemporaryDirectory(prefix="simipu3d-benchmark-") as folder:
        cases = write_made_data(Path(folder), samples, quick)
        return time_cases(cases, *((1, 2, 2) if quick else (8, 10, 1000)))
