"""LVM-Med's method: two views of a graph of images are matched, nodes and edges together."""
