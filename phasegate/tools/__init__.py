"""Hold programs that people and make run, and that no stage imports."""
