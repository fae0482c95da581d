"""Measure speed in ratios that a noisy machine cannot distort: all that is compared runs in turn, in one process."""
