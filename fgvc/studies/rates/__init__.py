"""Is a factor on the descriptor a change of the classifier's learning rate?"""
