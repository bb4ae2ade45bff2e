"""Which images there are, and how they are read."""
