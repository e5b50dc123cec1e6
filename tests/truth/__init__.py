"""Planted faults with known answers, and how well a diagnosis agrees with them."""
