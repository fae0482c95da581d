"""Define the classifier: experts, mixture-of-experts layer, reference models, routing statistics."""
