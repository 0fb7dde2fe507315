"""What the descriptors of a trained head say of the classes."""
