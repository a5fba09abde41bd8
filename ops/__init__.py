"""Kernels: sampling, neighbours, voxels, scatter and assignment.

Each is one function with a PyTorch reference that runs on any device and a numba kernel for CPU tensors; both give the
same result. Imported as `simipu3d.ops`, never as `ops`.
"""
