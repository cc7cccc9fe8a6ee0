"""Everything that knows torch and nnunetv2 lives here, and nowhere else."""
