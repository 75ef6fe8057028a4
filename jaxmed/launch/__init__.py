"""Starts the training command where machines are: processes here, SLURM, Cloud TPU VMs, Kubernetes."""
