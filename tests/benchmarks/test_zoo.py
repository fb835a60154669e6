"""Figures of `fastresnet list`: the committed ones match the committed runs."""

from benchmarks import zoo
from benchmarks.accuracy import read_summaries
from fastresnet.models import list_models
from fastresnet.zoo import read_zoo


def test_accuracies_are_those_of_the_committed_runs():
    assert read_zoo()["recipes"] == zoo.accuracies(read_summaries()), "run: python -m benchmarks.zoo"


def test_accuracies_are_of_the_default_network_in_the_order_of_seeds():
    runs = [("fast", "resnet20", 1, 91.5), ("fast", "resnet56", 0, 93.0), ("fast", "resnet20", 0, 91.0)]
    keys = ("recipe", "model", "seed", "test_accuracy")
    found = zoo.accuracies([dict(zip(keys, run, strict=True)) for run in runs])
    assert found["fast"] == [91.0, 91.5]
    assert found["best"] == []


def test_command_writes_all_networks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "ZOO", tmp_path / "zoo.json")
    monkeypatch.setattr(zoo, "costs", lambda model: {"parameters": len(model), "macs": 0})  # takes seconds
    monkeypatch.setattr("fastresnet.zoo.ZOO", tmp_path / "zoo.json")
    assert zoo.main([]) == 0
    assert list(read_zoo()["networks"]) == list_models()
    assert zoo.main(["--help"]) == 0
    assert zoo.main(["x"]) == 2
    assert capsys.readouterr().out.startswith("usage: python -m benchmarks.zoo")


def test_costs_are_those_of_the_summary():
    assert zoo.costs("speednet") == read_zoo()["networks"]["speednet"]


def test_table_of_networks_has_costs_and_the_accuracy_of_each_recipe(monkeypatch):
    keys = ("recipe", "model", "test_accuracy")
    runs = [("best", "resnet20", 93.0), ("fast", "resnet20", 91.0), ("fast", "resnet20", 92.0)]
    monkeypatch.setattr(zoo, "read_summaries", lambda: [dict(zip(keys, run, strict=True)) for run in runs])
    lines = zoo.networks_table().splitlines()
    assert "| `resnet20` | 0.27 | 40.8 | `fast` 91.50 ± 0.71 % (2 seeds), `best` 93.00 % (1 seed) |" in lines
    assert "| `wrn28-10` | 36.48 | 5,243.3 | not run |" in lines  # 36.5 million in Zagoruyko & Komodakis 2016
    assert len(lines) == 2 + len(list_models())
