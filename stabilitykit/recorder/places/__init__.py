"""Which batch row and which position each element of a tensor belongs to, followed from the tokens that entered."""
