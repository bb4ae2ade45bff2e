"""What every main shares: command line, errors, text tables, figures, the machine. No JAX."""
