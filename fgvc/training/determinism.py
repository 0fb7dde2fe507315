"""Algorithms that give the same bits every time, for devices on which the fastest ones do not."""

import os

import torch


def set_deterministic(enabled: bool) -> None:
    """Let torch use only algorithms that repeat themselves bit for bit; with False, any.

    Torch then raises a RuntimeError, which names the operation, where there is no such algorithm. For a GPU it also
    turns off cuDNN's search for the fastest algorithm, whose outcome depends on timing, and sets
    CUBLAS_WORKSPACE_CONFIG, unless it is set, which cuBLAS reads when it is first used: call this before anything runs
    there. Written after torch's notes on reproducibility; not run on a GPU by the authors.
    """
    torch.use_deterministic_algorithms(enabled)
    if enabled:
        torch.backends.cudnn.benchmark = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
