"""Benchmarks: what the library costs, each command a module; README.md says which answers what."""
