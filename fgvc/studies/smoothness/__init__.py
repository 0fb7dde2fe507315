"""studies/smoothness"""
