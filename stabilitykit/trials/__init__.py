"""What would help against a failure: every candidate is tried on the very input that failed."""
