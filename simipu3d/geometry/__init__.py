"""Transforms, cameras and boxes: geometry that every room shares."""
