"""Benchmarks' numbers by their official definitions: plain arrays in, numbers out."""
