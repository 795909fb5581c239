"""Commands; nothing else."""
