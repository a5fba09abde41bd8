"""The benchmarks' own files: label folders, submissions, `Objects` messages, depth maps. Each module has a `score` that
reads truth and predictions, checks that they belong together, and returns tables."""
