"""Training SAEs on an activation store: options → `train()` → `train_step()`."""
