"""Benchmarks: ours beside a peer in one process, as a ratio and as a share of what this machine can do at best."""
