"""Change the experts of a model in training: operations, controllers, and the 7b trial."""
