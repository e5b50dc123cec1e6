"""A checkpoint on disk -> config, tensors, vocabulary; one file per format."""
