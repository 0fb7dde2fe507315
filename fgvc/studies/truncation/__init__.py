"""How much the small eigenvalues matter."""
