"""The loop's side of the house: run configuration, checkpoints, metrics, scoring."""
