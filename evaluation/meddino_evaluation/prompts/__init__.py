"""Segmentation from a box or a point: SAM's mask decoder on any frozen backbone."""
