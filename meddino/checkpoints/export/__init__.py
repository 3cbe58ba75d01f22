"""Exports: written, proven equal to their source, and loaded again. A module and a row here make a format one."""

FORMATS = {
    "timm": "meddino.checkpoints.export.to_timm:export_timm",
    "hf": "meddino.checkpoints.export.to_transformers:export_transformers",
    "onnx": "meddino.checkpoints.export.to_onnx:export_onnx",
}
"""Formats beside our own, and where the function lies that writes its files into a folder, loads them and compares."""
