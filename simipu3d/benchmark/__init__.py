"""Timed comparisons, one file a suite: `measure(samples, quick)` returns the rows of one table. `tools/benchmark.py` runs
them; tests never time anything."""
