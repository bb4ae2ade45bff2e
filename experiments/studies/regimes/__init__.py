"""When does a distance between feature distributions help? One study over regimes of labels."""
