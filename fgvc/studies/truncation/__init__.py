"""studies/truncation"""
