"""The nuScenes reader against the devkit's own projection; the devkit pins numpy 1.26, so it runs in a Python of its own."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_nuscenes import open_nuscenes

from simipu3d.geometry.camera import project_points

HOW = (
    "set SIMIPU3D_DEVKIT_PYTHON to a Python that has the devkit: python3 -m venv devkit && "
    "devkit/bin/pip install nuscenes-devkit && export SIMIPU3D_DEVKIT_PYTHON=$PWD/devkit/bin/python"
)


@pytest.fixture
def devkit_python() -> str:
    python = os.environ.get("SIMIPU3D_DEVKIT_PYTHON")
    if not python:
        pytest.skip(HOW)
    return python


def kept_by_the_devkit(frame, camera, camera_from_lidar):
    """(N, 2) pixels of the points that the devkit draws, by its rule."""
    pixels, depth, _ = project_points(
        torch.from_numpy(frame.points[:, :3]),
        torch.from_numpy(camera.image_from_camera),
        torch.from_numpy(camera_from_lidar),
        camera.image.shape[:2],
        min_depth=1.0,
    )
    (u, v), (height, width) = pixels.unbind(dim=1), camera.image.shape[:2]
    return pixels[(depth > 1) & (u > 1) & (u < width - 1) & (v > 1) & (v < height - 1)].numpy()


@pytest.mark.slow  # needs an environment of its own
def test_pixels_are_the_devkits(devkit_python, samples, tmp_path):
    """Every point of every camera of every sample, to 1e-3 px; without the camera's ego pose the points would be others."""
    root, version, out = samples / "nuscenes", "v1.0-mini", tmp_path / "devkit.npz"
    script = Path(__file__).with_name("nuscenes_devkit_projection.py")
    subprocess.run([devkit_python, str(script), str(root), version, str(out)], check=True)
    expected = np.load(out, allow_pickle=False)
    reader = open_nuscenes(root, version=version, min_distance=0.0)
    largest, largest_single, compared = 0.0, 0.0, 0
    for index in range(len(reader)):
        frame = reader[index]
        for camera in frame.cameras:
            name = f"{frame.frame_id}/{camera.name}"
            pixels = kept_by_the_devkit(frame, camera, camera.camera_from_lidar)
            assert pixels.shape == expected[name].shape, name
            largest = max(largest, np.abs(pixels - expected[name]).max())
            if pixels.shape == expected[f"{name}/single"].shape:
                largest_single = max(largest_single, np.abs(pixels - expected[f"{name}/single"]).max())
            compared += len(pixels)
            record = int(reader.frames.cameras[index][reader.cameras.index(camera.name)])
            lidar = int(reader.frames.lidar[index])
            # Both sensors on the ego pose of the lidar: the second pose is skipped.
            ego_from = [reader.frames.sensors[reader.frames.sensor[each]].ego_from_sensor for each in (record, lidar)]
            still = np.linalg.inv(ego_from[0]) @ ego_from[1] @ frame.native_from_lidar
            wrong = kept_by_the_devkit(frame, camera, still)
            assert wrong.shape != pixels.shape or np.abs(wrong - pixels).max() > 1
    print(
        f"{compared} points: at most {largest:.1e} px off the devkit, {largest_single:.1e} px in its single precision"
    )
    assert compared > 1000
    assert largest < 1e-3
