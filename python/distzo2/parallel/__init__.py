"""Ranks that share every step: perturbations (PertP), micro-batches (DDP) or both, over torch.distributed."""

from distzo2.parallel.group import Mesh, current, init, join, joined, reset_stats, shutdown, stats

__all__ = ["Mesh", "current", "init", "join", "joined", "reset_stats", "shutdown", "stats"]
