"""Read and write what stages leave for each other: prepared data, tables, trial folders."""
