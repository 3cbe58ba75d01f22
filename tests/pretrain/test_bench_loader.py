"""The loader's benchmark."""

import json

from meddino_pretrain.bench.commands import loader as main
from meddino_pretrain.bench.loader import SyntheticSlices, bench_loader
from meddino_pretrain.methods.dinov3.config import (
    CropsConfig,
    CropSizes,
    DINOv3Config,
    GramTeacherConfig,
    LossesConfig,
    TeacherConfig,
)


def method(sizes: CropSizes) -> DINOv3Config:
    gram = sizes.gram_px is not None
    return DINOv3Config(
        losses=LossesConfig(gram_weight=float(gram)),
        crops=CropsConfig(sizes=(sizes,), num_local=2),
        teacher=TeacherConfig(ema_momentum=0.9, ema_momentum_end=0.9, temperature_warmup_steps=0),
        freeze_last_layer_steps=0,
        gram_teacher=GramTeacherConfig(stage="earlier", step=1) if gram else None,
    )


def test_bench_loader__measures_each_part_of_the_way():
    result = bench_loader(
        SyntheticSlices(count=4, side_px=64),
        method(CropSizes(global_px=32, local_px=16, gram_px=64)),
        patch_size=8,
        batch=4,
        steps=2,
    )
    assert json.loads(json.dumps(result)) == result
    assert result["slices_per_s_decode"] > result["slices_per_s_decode_and_crop"] > 0
    assert result["slices_per_s_intensity"] > 0 and result["slices_per_s_loader"] > 0
    assert (result["crops_of_a_slice"], result["rows"], result["batch"]) == (6, 64, 4)


def test_bench_loader__reads_a_corpus(make_corpus):
    result = bench_loader(
        make_corpus(count=6), method(CropSizes(global_px=32, local_px=16)), patch_size=8, batch=2, steps=2, workers=1
    )
    assert (result["rows"], result["cols"], result["workers"]) == (96, 80, 1)


def test_main__prints_one_json_line(capsys):
    options = ["--slice-size", "64", "--global-size", "32", "--local-size", "16", "--locals", "2", "--gram", "--batch", "2"]
    assert main([*options, "--steps", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out)["crops_of_a_slice"] == 6


def test_main__wrong_sizes_and_a_missing_corpus_are_one_line(capsys, tmp_path):
    assert main(["--global-size", "100", "--local-size", "96"]) == 2
    assert main(["--corpus", str(tmp_path / "none")]) == 2
    errors = capsys.readouterr().err.strip().split("\n")
    assert len(errors) == 2 and "global_crops=100" in errors[0] and "no such folder" in errors[1]
