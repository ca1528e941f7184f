"""Evaluation: which images, which models, what is measured on each, and what follows by arithmetic."""
