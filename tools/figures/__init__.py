"""The figures of a report: each file makes one kind of picture, from saved results where it can."""
