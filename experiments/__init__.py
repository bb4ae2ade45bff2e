"""The experiments: short programs over the library, one per data set."""
