"""Small sets of weights that modify a network: LoRA and textual inversion."""
