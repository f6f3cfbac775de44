"""Loss curves, read from our runs and from the logs of other trainers."""
