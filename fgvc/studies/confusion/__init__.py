"""Which classes a head takes for which."""
