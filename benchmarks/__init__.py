"""hybridpar beside torch's own parallelism: `python -m benchmarks.compare`."""
