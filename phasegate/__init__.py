"""phasegate: phase experiments on a mixture-of-experts classifier."""
