"""What float32 spectra cost against float64."""
