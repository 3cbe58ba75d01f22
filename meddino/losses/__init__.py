"""The objectives' formulas as functions of tensors."""
