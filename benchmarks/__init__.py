"""Speed and quality against a peer in the same run. Each module prints one JSON line last.

`python -m benchmarks.record NAME ...` keeps that line under `results/`; `python -m benchmarks.readme` copies it into the pages that show
it.
"""
