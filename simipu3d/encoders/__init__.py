"""Point and image encoders. Importing this package fills the registry `POINT_ENCODERS`."""

from simipu3d.encoders import pillar, pointnet2, sparse_unet, voxel_backbone

__all__ = ["pillar", "pointnet2", "sparse_unet", "voxel_backbone"]
