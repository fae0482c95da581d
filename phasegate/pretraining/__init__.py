"""Train models from scratch (phase 7a), search over configurations, and rank them."""
