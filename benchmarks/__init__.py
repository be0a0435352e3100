"""``python -m benchmarks NAME``: what the project measures, each figure as a JSON line."""
