"""`PYTHON nuscenes_devkit_projection.py ROOT VERSION OUT.npz`: where does nuscenes-devkit itself draw the lidar points?

Run by a Python that has nuscenes-devkit, whose pins clash with this package's; nothing of this package is used. For every
sample and camera OUT holds, under `<sample token>/<channel>`, the (N, 2) pixels of the points that
`NuScenesExplorer.map_pointcloud_to_image` keeps (at least 1 m deep, more than a pixel inside the border), in the order of
the file, and under `<sample token>/<channel>/single` the same with the devkit's own single-precision points.
"""

import sys

import numpy as np
from nuscenes.nuscenes import NuScenes
from nuscenes.utils.data_classes import LidarPointCloud


def project(nusc, sample):
    """Channel -> (N, 2) pixels."""
    pixels = {}
    for channel, token in sample["data"].items():
        if channel.startswith("CAM_"):
            points, _, _ = nusc.explorer.map_pointcloud_to_image(sample["data"]["LIDAR_TOP"], token)
            pixels[channel] = points[:2].T
    return pixels


def main(root, version, out):
    nusc = NuScenes(version=version, dataroot=root, verbose=False)
    read = LidarPointCloud.from_file.__func__

    class DoublePointCloud(LidarPointCloud):
        """The devkit moves float32 points through the global frame, where they keep only a tenth of a millimetre."""

        @classmethod
        def from_file(cls, file_name):
            cloud = read(LidarPointCloud, file_name)
            cloud.points = cloud.points.astype(np.float64)
            return cloud

    arrays = {}
    for precision, kind in (("/single", LidarPointCloud), ("", DoublePointCloud)):
        nusc.explorer.map_pointcloud_to_image.__func__.__globals__["LidarPointCloud"] = kind
        for sample in nusc.sample:
            for channel, pixels in project(nusc, sample).items():
                arrays[f"{sample['token']}/{channel}{precision}"] = pixels
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
