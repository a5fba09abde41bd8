"""How do frames become batches? Augmentation, collation, order and the loader."""
