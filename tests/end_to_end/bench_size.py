"""Size of the runs of this folder."""

STEPS = 5
