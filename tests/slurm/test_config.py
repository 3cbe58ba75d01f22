import pytest
from meddino_slurm.config import SiteConfig, time_limit_min

from meddino.core.config import load_config, shipped_configs
from meddino.core.errors import ConfigError

SHIPPED = sorted(path.stem for path in (shipped_configs() / "slurm").glob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("90:30", 91), ("12:00:00", 720), ("2-00", 2880), ("2-12:30", 3630), ("1-00:00:01", 1441), ("0:10", 1)],
)
def test_time_limit__every_form_of_slurm(text, minutes):
    assert time_limit_min(text) == minutes


@pytest.mark.parametrize("text", ["", "2h", "1:99", "1-2-3", "12:00:00:00", "-5", "0", "00:00:00", "1 day"])
def test_time_limit__refuses_other_forms(text):
    with pytest.raises(ValueError, match="time limit"):
        time_limit_min(text)


@pytest.mark.parametrize("name", SHIPPED)
def test_site_profile__shipped_ones_are_valid(name):
    assert load_config(SiteConfig, [name], kind="slurm").resources_for("pretrain").tasks_per_node >= 1


def test_site_profile__the_one_to_copy_has_every_key():
    written = set((shipped_configs() / "slurm" / "site.yaml").read_text().splitlines())
    for field in SiteConfig.model_fields:
        assert any(line.startswith(f"{field}:") for line in written), field


def test_site_profile__examples_are_what_their_names_say():
    nodes_gpus = {name: load_config(SiteConfig, [name], kind="slurm").pretrain for name in SHIPPED}
    assert (nodes_gpus["dgx"].nodes, nodes_gpus["dgx"].gpus_per_node) == (1, 8)
    assert (nodes_gpus["four_nodes_of_eight"].nodes, nodes_gpus["four_nodes_of_eight"].gpus_per_node) == (4, 8)
    assert nodes_gpus["cpu_only"].gpus_per_node == 0


def test_site_profile__unknown_key_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key 'partitoin'; did you mean 'partition'\?"):
        load_config(SiteConfig, ["site"], ["partitoin=gpu"], kind="slurm")


def test_site_profile__unknown_key_in_a_section_is_refused():
    with pytest.raises(ConfigError, match=r"'pretrain.gpus'"):
        load_config(SiteConfig, ["site"], ["pretrain.gpus=8"], kind="slurm")


def test_site_profile__time_in_a_wrong_form_says_the_right_ones():
    with pytest.raises(ConfigError, match=r"'pretrain.time' is '2 days': a time limit is minutes, .*days-hours"):
        load_config(SiteConfig, ["site"], ["pretrain.time=2 days"], kind="slurm")


def test_site_profile__time_without_quotes_is_told_to_be_quoted(tmp_path):
    # YAML reads 12:30:00 as the number 45000.
    text = (shipped_configs() / "slurm" / "site.yaml").read_text().replace('time: "24:00:00"', "time: 24:30:00")
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match="quote"):
        load_config(SiteConfig, [tmp_path / "mine.yaml"])


def test_site_profile__a_command_may_have_a_partition_of_its_own():
    site = load_config(SiteConfig, ["site"], ["partition=gpu", "curate.partition=cpu"], kind="slurm")
    assert (site.partition_for("pretrain"), site.partition_for("curate")) == ("gpu", "cpu")
