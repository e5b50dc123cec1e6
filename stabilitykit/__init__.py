"""Find where, and why, Gemma leaves float16's range."""
