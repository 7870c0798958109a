"""Programs that measure and draw: `python -m experiments.NAME --help`."""
