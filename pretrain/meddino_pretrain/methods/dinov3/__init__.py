"""DINOv3: DINO between crops, iBOT on masked patches, KoLeo, Gram anchoring."""
