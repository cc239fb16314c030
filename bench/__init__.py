"""Benchmarks: each prints a table and stores it with its hardware, versions and command."""
