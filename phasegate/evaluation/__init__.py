"""Evaluate checkpoints on the test split."""
