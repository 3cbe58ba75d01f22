"""An exported model inside nnU-Net: plans that carry its input contract, its network, and a trainer class."""
