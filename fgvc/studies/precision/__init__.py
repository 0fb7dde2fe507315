"""studies/precision"""
