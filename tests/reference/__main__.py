"""`python -m tests.reference RECORDS`: compare the project with a folder of recorded numbers."""

import argparse
import sys
from pathlib import Path

from tests.reference.backbones import compare_backbone
from tests.reference.losses import compare_losses
from tests.reference.records import Records
from tests.reference.report import Item, RecordsError, as_table
from tests.reference.training_step import compare_parameter_groups, compare_training_step


def compare(folder: Path) -> list[Item]:
    """Compare everything that a folder of records holds.

    Raises:
        RecordsError: If there is nothing to compare.
    """
    records = Records.read(folder)
    items = [item for name in records.backbones() for item in compare_backbone(records, name)]
    if "losses" in records.described:
        items += compare_losses(records)
    if "parameter_groups" in records.described and "training_step" in records.described:
        items += compare_parameter_groups(records)
    if "training_step" in records.described:
        items += compare_training_step(records)
    if not items:
        raise RecordsError(f"{folder}/records.json names nothing that is known here: {', '.join(records.described)}")
    return items


def main(argv: list[str] | None = None) -> int:
    """Print each item's largest difference against its tolerance; 1 if one is beyond, 2 if there is nothing to compare."""
    parser = argparse.ArgumentParser(prog="python -m tests.reference", description=__doc__)
    parser.add_argument("records", type=Path, help="folder with records.json, e.g. ../shared/reference")
    try:
        items = compare(parser.parse_args(argv).records)
    except RecordsError as error:
        sys.stderr.write(f"reference: error: {error}\n")
        return 2
    sys.stdout.write(as_table(items) + "\n")
    return 0 if all(item.passed for item in items) else 1


if __name__ == "__main__":
    raise SystemExit(main())
