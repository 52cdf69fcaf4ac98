"""What of λ̂'s curve is a change of the model, and what is the size of its weights (docs/geometry.md)."""
