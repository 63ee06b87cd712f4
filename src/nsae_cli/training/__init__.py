"""Training SAEs on the rows of a source, a store or a model: options → `train()` → `train_step()`."""
