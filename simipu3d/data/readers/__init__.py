"""Readers of data sets: folders in, Frames out. One file a data set; importing a module files its reader in
`READERS`."""

from simipu3d.data.readers import custom, depth_list, kitti, mixed, nuscenes, shards, waymo

__all__ = ["custom", "depth_list", "kitti", "mixed", "nuscenes", "shards", "waymo"]
