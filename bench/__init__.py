"""How fast it is, in ratios that a noisy machine can't distort: everything compared runs in turn, in one process."""
