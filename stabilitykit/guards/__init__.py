"""In production: which row of a batch broke, in which step, where and why, while the others go on."""
