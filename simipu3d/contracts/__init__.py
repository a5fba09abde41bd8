"""What the parts hand to each other: a Frame, a Batch of views, tokens."""
