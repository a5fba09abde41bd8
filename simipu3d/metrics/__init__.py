"""The official metrics of the downstream benchmarks: plain arrays in, numbers out. `files` reads and writes the benchmarks'
own formats; `docs/metrics.md` names every definition and its source."""
