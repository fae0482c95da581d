"""Hold what every package needs and no number depends on: errors, files, paths, settings, processes."""
