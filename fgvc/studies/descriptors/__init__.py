"""studies/descriptors"""
