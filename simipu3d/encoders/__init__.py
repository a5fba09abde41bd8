"""Point and image encoders. Importing this package fills the registry `POINT_ENCODERS`."""

from simipu3d.encoders import pointnet2, sparse_unet, voxel_backbone

__all__ = ["pointnet2", "sparse_unet", "voxel_backbone"]
