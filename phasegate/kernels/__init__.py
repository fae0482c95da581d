"""Compute products, routing, mixtures and Adam's steps in compiled code whose bits depend on nothing but the operands."""
