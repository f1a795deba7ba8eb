"""Building Horovod 0.28.1 for today's torch: `python -m hybridpar.install`. Standard library only."""
