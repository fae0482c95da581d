"""Judge experts: published signals, the measured truth, what predicts it, and how good each signal is."""
