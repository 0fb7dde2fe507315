"""studies/gradients"""
