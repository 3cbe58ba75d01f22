"""`meddino-eval show`: every setting of a command with its unit and source."""

import argparse

from meddino.core.command import write_line
from meddino.core.config import StrictConfig
from meddino.core.show_config import show_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.add_argument(
        "what", choices=("segment", "probe", "prompt", "classification", "detection", "study"), help="whose settings"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override any key")
    parser.add_argument(
        "--config",
        help="a YAML file, a shipped name or a results folder; if not given: paper for segment, study_acceptance for study, "
        "the defaults for the others",
    )
    parser.add_argument("--against", metavar="OTHER", help="print only the values in which it differs from this config")


def run(arguments: argparse.Namespace) -> None:
    """Print the config."""
    from meddino_evaluation.classification.config import ClassificationConfig
    from meddino_evaluation.detection.config import DetectConfig
    from meddino_evaluation.prompts.config import PromptConfig
    from meddino_evaluation.segmentation.config import SegmentConfig
    from meddino_evaluation.segmentation.dense_probe.config import ProbeConfig
    from meddino_evaluation.study.config import StudyConfig

    schemas: dict[str, type[StrictConfig]] = {
        "segment": SegmentConfig,
        "probe": ProbeConfig,
        "prompt": PromptConfig,
        "classification": ClassificationConfig,
        "detection": DetectConfig,
        "study": StudyConfig,
    }
    source = arguments.config or {"study": "study_acceptance", "segment": "paper"}.get(arguments.what, arguments.what)
    write_line(show_config(schemas[arguments.what], source, arguments.overrides, "evaluation", arguments.against))
