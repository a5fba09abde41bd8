"""Which token belongs to which token of the other view, and to which pixel? No gradient, and no loss, is known here."""
