"""What is learnt: one module an objective, all behind the protocol of `base`."""
