"""What all training scripts share: initial parameters, data, noise and targets, the training step, checkpoints,
logs."""
