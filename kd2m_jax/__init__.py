"""Knowledge distillation by matching feature distributions, in JAX and Flax."""
