"""Small models of many families in which float16 breaks, each with what is known of its exact repair."""
