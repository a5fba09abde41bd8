"""Noise that is a function of the place, so that a wall looks the same from every camera and in every frame."""

import math

from numba import njit

inner = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""Compiles what only kernels call; without the wrappers for Python that takes a quarter less time."""


@njit
def lattice(i, j, k, seed):
    """A number in [0, 1) for every integer cell (i, j, k): the low bits of a multiply-and-shift hash."""
    h = i * 374761393 + j * 668265263 + k * 1440662683 + seed * 1274126177
    h = (h ^ (h >> 13)) * 1103515245
    h = (h ^ (h >> 15)) * 668265263
    h ^= h >> 16
    return (h & 0xFFFFFF) / 16777216.0


@inner
def value_noise(x, y, seed):
    """Smooth noise in [0, 1) with features of size 1: lattice values joined by cubic steps."""
    i, j = math.floor(x), math.floor(y)
    fx, fy = x - i, y - j
    fx, fy = fx * fx * (3.0 - 2.0 * fx), fy * fy * (3.0 - 2.0 * fy)
    low = lattice(i, j, 0, seed) * (1.0 - fx) + lattice(i + 1, j, 0, seed) * fx
    high = lattice(i, j + 1, 0, seed) * (1.0 - fx) + lattice(i + 1, j + 1, 0, seed) * fx
    return low * (1.0 - fy) + high * fy


@inner
def cloud_noise(x, y, seed):
    """Four octaves of `value_noise`, in [0, 1)."""
    total, weight = 0.0, 0.5
    for octave in range(4):
        total += weight * value_noise(x, y, seed + octave)
        x, y, weight = 2.03 * x + 7.1, 2.03 * y + 3.7, 0.5 * weight
    return total / 0.9375
