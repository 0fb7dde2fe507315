"""Eigenvalues of the covariance: of methods, classes and layers, and over training."""
