"""The loop's side of the house: run configuration, checkpoints, metrics, scoring. No model, no pipeline code."""
