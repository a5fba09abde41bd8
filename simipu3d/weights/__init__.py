"""How do foreign weights start a network? Names and layouts of other packages, folding, and reading files safely."""
