"""Does it keep quality, against whom, at what budget: `python -m bench.quality --help`."""
