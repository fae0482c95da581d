"""Compute products, routing and steps of AdamW in compiled code, whose bits depend on nothing but the operands."""
