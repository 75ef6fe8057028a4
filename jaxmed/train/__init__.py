"""One training loop that every method shares, its state, its checkpoints and its logs."""
