"""Ranks that share every step: perturbations (PertP), micro-batches (DDP) or both, over torch.distributed."""

from distzo2.parallel.group import Mesh, barrier, current, init, join, joined, reset_stats, shutdown, stats

__all__ = ["Mesh", "barrier", "current", "init", "join", "joined", "reset_stats", "shutdown", "stats"]
