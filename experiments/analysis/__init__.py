"""One finished run, looked into."""
