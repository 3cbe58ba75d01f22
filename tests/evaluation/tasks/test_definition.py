import pytest
from meddino_evaluation.tasks.definition import load_task, task_names
from meddino_evaluation.tasks.prepare import data_of

from meddino.core.errors import ConfigError


@pytest.mark.parametrize("name", task_names())
def test_load_task__every_shipped_definition_is_complete(name):
    task = load_task(name)
    assert task.name == name
    assert task.where.startswith("https://")
    assert all((task.title, task.citation, task.licence, task.split_rule))


def test_load_task__an_unknown_name_lists_the_shipped_ones():
    with pytest.raises(ConfigError, match="isic2018"):
        load_task("isic")


def test_load_task__labels_without_a_mask_are_refused(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "{name: own, title: t, kind: segmentation2d, citation: c, licence: l, where: 'https://x', split_rule: s,"
        " labels: [a, b], layout: {kind: label_maps, images: {rgb: '{case}.png'}, masks: [{path: '{case}_m.png', label: a}]}}"
    )
    with pytest.raises(ConfigError, match=r"'a', 'b'"):
        load_task(file)


def test_data_of__a_task_of_prompts_has_the_data_of_the_other(tmp_path):
    shown = data_of(load_task("drive_boxes"))[1]
    assert shown.name == "drive" and shown.labels == ("vessel",)
