"""Detection: torchvision's detectors over any backbone, boxes of every usual format, AP and FROC over patients."""
