"""One SAE trained by several processes: each has a slice of every batch (data), a slice of the features, or both.

nsae starts no processes: a launcher (torchrun, srun) starts the same command N times. `join` makes a `Ranks` of them,
which is handed to `train()`; with one process that is `ALONE`, whose operations do nothing. `mesh` says who has which
part, `group` and `ranks` are what processes tell each other, `gradients` adds up what their rows give, `exchange` is
what a step over some of the features asks the others, `watch` finds out who has failed.
"""
