"""Small sets of numbers that change a network: low-rank pairs and new tokens."""
