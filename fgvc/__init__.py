"""Fine-grained visual recognition with second-order statistics."""

__version__ = "0.1.0"
