"""Writes drive_world as full-size Waymo drives, v1 and v2: input for benchmarks and tests, not a part of the product."""
