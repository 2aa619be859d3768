"""What every training script shares: fresh numbers, data, noise and targets, the step, checkpoints and logs."""
