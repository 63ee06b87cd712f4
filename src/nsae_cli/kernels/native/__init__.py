"""The compiled loops of the sparse training step: C source, and the one place that loads it (`library`)."""
