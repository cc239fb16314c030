"""A load test of a running server through its public API: `python -m bench.load --help`."""
