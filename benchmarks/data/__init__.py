"""The road from text to batches, as ``benchmarks/ops`` has the ops."""
