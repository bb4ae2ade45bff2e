"""What the experiments share: data, command line, run folder, report."""
