"""MODEL_CARD.md: what a person needs to know before using the weights. Made from config.json's content alone."""

from meddino.checkpoints.export.model_folder import OWN_LICENCE, Lineage, ModelConfig
from meddino.data.intensity import MEMBERS, Intensity, Modality

_AXIAL = "Axial slices, rows from front to back, columns from the patient's right to left (LPS)"
DINOV3_LICENCE_URL = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"


def model_card(config: ModelConfig) -> str:
    """Return the card as Markdown. Equal configs give equal text; there is no date in it."""
    contract, kind = config.input_contract, config.architecture.kind
    parts = [
        _front_matter(config.lineage, contract.modality),
        f"# MedDINO {config.architecture.name}",
        f"A {kind} for {MEMBERS[contract.modality].seen} ({config.weights.role}'s backbone), pretrained by self-supervision.",
        "Research use; not a medical device. It was never tested for diagnosis.",
        _section(
            "Architecture",
            [
                config.architecture.in_words,
                f"{config.weights.parameters:,} parameters, {config.weights.dtype}, SHA-256 of `{config.weights.file}`: "
                f"`{config.weights.sha256}`",
            ],
        ),
        _input(config),
        _training(config),
        _licence(config.lineage),
        _metrics(config),
        _section(
            "How it was made",
            [f"`{config.command}`", f"MedDINO {config.meddino_version}, format {config.format} {config.version}"],
        ),
        _usage(contract),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(lineage: Lineage, modality: Modality) -> str:
    licence = "apache-2.0" if lineage.licence == OWN_LICENCE else "other"
    lines = ["---", f"license: {licence}"]
    if licence == "other":
        lines.append(f"license_name: {lineage.licence}")
    return "\n".join([*lines, f"tags: [{MEMBERS[modality].tag}, self-supervised-learning, vision-transformer]", "---"])


def _section(title: str, lines: list[str]) -> str:
    return "\n".join([f"## {title}", "", *(f"- {line}" for line in lines)])


def _input(config: ModelConfig) -> str:
    contract = config.input_contract
    sides = f"{config.architecture.sides}; sides of the crops" if config.architecture.sides else "Sides of the crops"
    seen = ", ".join(map(str, config.resolutions_px_seen)) or "not recorded"
    return _section(
        "Input contract",
        [
            contract.in_words,
            f"{sides} in training [px]: {seen}",
            *([] if MEMBERS[contract.modality].units == "brightness" else [_AXIAL]),
        ],
    )


def _training(config: ModelConfig) -> str:
    lineage = config.lineage
    lines = [f"stage {stage.name}: {stage.steps:,} steps" for stage in lineage.stages] or ["no training recorded"]
    if lineage.parent is None:
        lines.append("started from random weights")
    else:
        sha256 = f", SHA-256 `{lineage.parent.sha256}`" if lineage.parent.sha256 else ""
        lines.append(f"started from {lineage.parent.name} ({lineage.parent.licence}{sha256})")
    lines.append(f"corpus: content hash `{lineage.corpus_hash}`" if lineage.corpus_hash else "corpus: not recorded")
    for record in lineage.data:
        volumes = f", {record.volumes:,} volumes" if record.volumes is not None else ""
        lines.append(f"data set {record.dataset}: licence {record.licence}{volumes}")
    audited = ", ".join(lineage.audited_against)
    lines.append(
        f"audited against: {audited}" if audited else "audited against no test set: check for overlap before you evaluate"
    )
    return _section("Training", lines)


def _licence(lineage: Lineage) -> str:
    lines = [f"these weights: {lineage.licence}"]
    if lineage.parent is not None:
        lines.append(
            f"derived from {lineage.parent.name}; its licence ({lineage.parent.licence}) travels along with every copy"
        )
        if "dinov3" in lineage.parent.licence.lower():
            lines.append(f"the text of that licence: {DINOV3_LICENCE_URL}; pass a copy on with the weights")
    if lineage.data:
        lines.append("the data sets have licences of their own, see above; some forbid commercial use")
    return _section("Licence", lines)


def _metrics(config: ModelConfig) -> str:
    lines = [f"{name}: {value}" for name, value in sorted(config.metrics.items())]
    return _section("Figures", lines or ["none were given at export"])


def _usage(contract: Intensity) -> str:
    code = [
        "import meddino, torch",
        "",
        'model = meddino.load("this/folder")',
        f"stored = torch.zeros(1, 256, 256)                        # {MEMBERS[contract.modality].given}",
        f"images = model.preprocess(stored)                        # [1, {contract.channels}, 256, 256] by the input contract",
        "features = model.forward_features(images)                # .cls_token, .patch_tokens",
        "maps = model.get_intermediate_layers(images, n=4, reshape=True)  # patch maps of the last four blocks",
    ]
    return "\n".join(["## Use", "", "```python", *code, "```"])
