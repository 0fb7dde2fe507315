"""studies/spectra"""
