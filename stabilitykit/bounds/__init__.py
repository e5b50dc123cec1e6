"""What no prompt can make a Gemma exceed: bounds proved from its weights alone."""
