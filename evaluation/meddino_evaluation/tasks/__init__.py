"""The tasks of the field by name: where their files lie, how they are split, what was published on them."""
