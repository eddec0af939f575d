"""How real numbers become 8 or 4 bits: the arithmetic, and which way a weight is rounded."""
