"""The commands of the product, each a thin main, and what they share (`runtime/`)."""
