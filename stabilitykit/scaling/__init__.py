"""The scale calculus: by which powers of two a model's tensors can be multiplied so that it computes the same function."""
