"""One adapter for every backbone: ours, timm's, transformers' and medical ones, with their own input contracts."""
