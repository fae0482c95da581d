"""Train a model, and save, verify and resume what is trained."""
