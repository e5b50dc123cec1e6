"""The scale calculus: which powers of two leave what a model computes as it is, to the last bit."""
