"""The backbones that the field's studies compared, by name: what builds them and which file their weights come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True)
class Entry:
    """A backbone that is built elsewhere.

    Attributes:
        architecture: Its name in timm, its class in transformers, or ours.
        source: Where its weights are published.
        licence: Of the weights.
        library: What builds it.
        arguments: For the builder.
        prefixes: Where in a weights file the image encoder lies; the first that occurs is taken, else the whole file.
        takes_unit: Pictures go in as values from 0 to 1; False: with the mean and deviation that the library states.
    """

    architecture: str
    source: str
    licence: str
    library: Literal["timm", "transformers", "meddino"] = "timm"
    arguments: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    prefixes: tuple[str, ...] = ()
    takes_unit: bool = False


_DINOV2 = "https://github.com/facebookresearch/dinov2"
_DINOV3 = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/ (on request)"
_TORCHVISION = "https://pytorch.org/vision/stable/models.html (ImageNet-1k)"
_VISUAL = ("visual.trunk.", "visual.", "module.visual.")
_SAM = ("image_encoder.", "module.image_encoder.", "vision_encoder.")
_MSN_LARGE = MappingProxyType(
    {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096, "patch_size": 16}
)

CATALOGUE: dict[str, Entry] = {
    "dinov2_vits14": Entry("vit_small_patch14_dinov2.lvd142m", _DINOV2, "Apache-2.0"),
    "dinov2_vitb14": Entry("vit_base_patch14_dinov2.lvd142m", _DINOV2, "Apache-2.0"),
    "dinov2_vitl14": Entry("vit_large_patch14_dinov2.lvd142m", _DINOV2, "Apache-2.0"),
    "dinov2_vitg14": Entry("vit_giant_patch14_dinov2.lvd142m", _DINOV2, "Apache-2.0"),
    "dinov3_vits16": Entry("vit_small_patch16_dinov3.lvd1689m", _DINOV3, "DINOv3 License"),
    "dinov3_vitb16": Entry("vit_base_patch16_dinov3.lvd1689m", _DINOV3, "DINOv3 License"),
    "dinov3_vitl16": Entry("vit_large_patch16_dinov3.lvd1689m", _DINOV3, "DINOv3 License"),
    "meddinov3_vitb16": Entry(
        "vitb16",
        "https://huggingface.co/ricklisz123/MedDINOv3-ViTB-16-CT-3M",
        "Apache-2.0 on its card; made from Meta's weights, which are under the DINOv3 License",
        library="meddino",
    ),
    "vitl16_in21k": Entry("vit_large_patch16_224.augreg_in21k", "https://huggingface.co/timm", "Apache-2.0"),
    "resnet50": Entry("resnet50.tv_in1k", _TORCHVISION, "BSD-3-Clause"),
    "resnet152": Entry("resnet152.tv_in1k", _TORCHVISION, "BSD-3-Clause"),
    "vgg16": Entry("vgg16.tv_in1k", _TORCHVISION, "BSD-3-Clause"),
    "vgg19": Entry("vgg19.tv_in1k", _TORCHVISION, "BSD-3-Clause"),
    "densenet121": Entry("densenet121.tv_in1k", _TORCHVISION, "BSD-3-Clause"),
    "densenet201": Entry("densenet201.tv_in1k", _TORCHVISION, "BSD-3-Clause"),
    "mae_vitl16": Entry("vit_large_patch16_224.mae", "https://github.com/facebookresearch/mae", "CC BY-NC 4.0"),
    "msn_vitl16": Entry(
        "ViTMSNModel",
        "https://huggingface.co/facebook/vit-msn-large",
        "Apache-2.0",
        library="transformers",
        arguments=_MSN_LARGE,
        prefixes=("vit.",),
    ),
    "clip_vitl14": Entry("vit_large_patch14_clip_224.openai", "https://github.com/openai/CLIP", "MIT", prefixes=_VISUAL),
    "openclip_vith14": Entry(
        "vit_huge_patch14_clip_224.laion2b", "https://github.com/mlfoundations/open_clip", "MIT", prefixes=_VISUAL
    ),
    "sam_vitl16": Entry(
        "samvit_large_patch16.sa1b", "https://github.com/facebookresearch/segment-anything", "Apache-2.0", prefixes=_SAM
    ),
    "sam_vitb16": Entry(
        "samvit_base_patch16.sa1b", "https://github.com/facebookresearch/segment-anything", "Apache-2.0", prefixes=_SAM
    ),
    "medsam_vitb16": Entry(
        "samvit_base_patch16", "https://github.com/bowang-lab/MedSAM", "Apache-2.0", prefixes=_SAM, takes_unit=True
    ),
    "biomedclip_vitb16": Entry(
        "vit_base_patch16_224",
        "https://huggingface.co/microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
        "MIT",
        prefixes=("visual.trunk.",),
    ),
    "lvmmed_resnet50": Entry(
        "resnet50", "https://github.com/duyhominhnguyen/LVM-Med", "CC BY-NC-ND 2.0", prefixes=("module.", "encoder.")
    ),
    "lvmmed_vitb16": Entry(
        "samvit_base_patch16",
        "https://github.com/duyhominhnguyen/LVM-Med",
        "CC BY-NC-ND 2.0",
        # As its authors build it: SAM's encoder without a position embedding.
        arguments=MappingProxyType({"use_abs_pos": False}),
        prefixes=_SAM,
    ),
}
"""The lists of DINOv2ForRadiology, the freezing study and LVM-Med; `timm:<name>` and `hf:<folder>` reach all others."""
