"""The operations that a training step spends its time in.

Each has a dense reference in plain torch autograd (`reference`), which is obviously right and runs in float64, and
faster twins of the same signature. `select` is the one place that chooses among them and says why. This room knows
nothing of the ones above it: activations and penalties come in as arguments (`types`).
"""
