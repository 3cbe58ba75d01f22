"""Files that travel with the package."""

from pathlib import Path


def shipped_configs() -> Path:
    """Return the folder of the shipped YAML files: inside the installed package, or beside it in a source tree."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"
