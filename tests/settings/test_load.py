"""YAML files and overrides become one RunSpec, and a RunSpec becomes one file."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings.errors import SettingsError, UserError
from orchestrator.settings.load import (
    DATA_KEYS,
    load_spec,
    looks_local,
    make_spec,
    paths_in,
    save_spec,
)
from support.tiny_settings import raw_settings, tiny_spec, write_settings


def yaml(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_files_merge_left_to_right_then_overrides(tmp_path: Path) -> None:
    base = write_settings(tmp_path)
    second = yaml(
        tmp_path / "second.yaml", "optimizer: {lr: 2.0, weight_decay: 0.5}\ndpo: {beta: 0.2}\n"
    )
    third = yaml(tmp_path / "third.yaml", "optimizer:\n  lr: 3.0\n")
    spec = load_spec([base, second, third], ["dpo.beta=0.3"])
    assert (spec.optimizer.lr, spec.optimizer.weight_decay, spec.dpo.beta) == (3.0, 0.5, 0.3)
    assert load_spec([base, third, second]).optimizer.lr == 2.0
    assert load_spec([base], ["dpo.beta=0.3", "dpo.beta=0.4"]).dpo.beta == 0.4


def test_a_single_path_equals_a_list_of_one(tmp_path: Path) -> None:
    path = write_settings(tmp_path)
    assert load_spec(path) == load_spec(str(path)) == load_spec([path])


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001"])
def test_a_float_without_a_dot_is_a_float(tmp_path: Path, text: str) -> None:
    base = write_settings(tmp_path)
    second = yaml(tmp_path / "lr.yaml", f"optimizer:\n  lr: {text}\n  kwargs: {{eps: {text}}}\n")
    for spec in (
        load_spec([base, second]),
        load_spec(base, [f"optimizer.lr={text}", f"optimizer.kwargs.eps={text}"]),
    ):
        assert spec.optimizer.lr == 1e-5
        assert spec.optimizer.kwargs["eps"] == 1e-5
        assert type(spec.optimizer.kwargs["eps"]) is float


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.epochs=null", "training.epochs", None),
        ("model.init.config.x=[1,2]", "model.init.config.x", [1, 2]),
        ("wandb.group=a=b", "wandb.group", "a=b"),
        ("training.gradient_checkpointing=true", "training.gradient_checkpointing", True),
        ("run.name='007'", "run.name", "007"),
        ("reference.cache=off", "reference.cache", "off"),  # which YAML reads as false
    ],
)
def test_overrides_are_yaml(tmp_path: Path, override: str, key: str, value: Any) -> None:
    actual: Any = load_spec(write_settings(tmp_path), [override]).model_dump()
    for part in key.split("."):
        actual = actual[part]
    assert actual == value


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("run.dir", "elsewhere", "{cwd}/elsewhere"),
        ("data.cache_dir", "org/cache", "{cwd}/org/cache"),
        ("cluster.storage_path", "../up", "{parent}/up"),
        ("data.train", "pairs.jsonl", "{cwd}/pairs.jsonl"),
        ("data.eval", "./folder", "{cwd}/folder"),
        ("data.train", "org/dataset", "org/dataset"),
        ("data.train", "present/here", "{cwd}/present/here"),
        ("model.tokenizer", "org/tokenizer", "org/tokenizer"),
        ("model.tokenizer", "~/tokenizer", "{home}/tokenizer"),
        ("reference.path", "./model", "{cwd}/model"),
        ("reference.path", "/an/absolute/one", "/an/absolute/one"),
    ],
)
def test_relative_paths_become_absolute_and_hub_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: str, expected: str
) -> None:
    path = write_settings(tmp_path)
    cwd = tmp_path / "cwd"
    (cwd / "present" / "here").mkdir(parents=True)
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    actual = paths_in(load_spec(path, [f"{key}={value}"]), [key])
    assert actual[key] == expected.format(cwd=cwd, parent=tmp_path, home=tmp_path / "home")


def test_each_evaluation_set_has_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_settings(tmp_path, data={"eval": {"easy": "easy.jsonl", "hard": "org/hard"}})
    monkeypatch.chdir(tmp_path)
    spec = load_spec(path, ["data.eval.odd=odd.parquet"])
    assert paths_in(spec, DATA_KEYS) == {
        "data.train": str(tmp_path / "train.jsonl"),
        "data.eval.easy": str(tmp_path / "easy.jsonl"),
        "data.eval.hard": "org/hard",
        "data.eval.odd": str(tmp_path / "odd.parquet"),
    }


def test_each_training_set_has_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [
        "a.jsonl",
        {"path": "./b", "weight": 2, "split": "odd"},
        {"path": "org/c", "name": "a.jsonl"},
    ]
    path = write_settings(tmp_path, data={"train": sets, "eval": {"path": "d.jsonl"}})
    monkeypatch.chdir(tmp_path)
    spec = load_spec(path)
    assert paths_in(spec, DATA_KEYS) == {
        "data.train.0": str(tmp_path / "a.jsonl"),
        "data.train.1": str(tmp_path / "b"),
        "data.train.2": "org/c",
        "data.eval": str(tmp_path / "d.jsonl"),
    }
    assert [(each.name, each.split, each.weight) for each in spec.data.train] == [
        (None, None, 1.0),
        (None, "odd", 2.0),
        ("a.jsonl", None, 1.0),
    ]
    save_spec(spec, tmp_path / "saved.yaml")
    assert load_spec(tmp_path / "saved.yaml") == spec
    assert load_spec(path, ["data.train=e.jsonl"]).data.train[0].path == str(tmp_path / "e.jsonl")
    with pytest.raises(
        UserError, match="one has a list where a later file or override has a block"
    ):
        load_spec(path, ["data.train.split=x"])


def test_the_default_run_folder_is_absolute_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_settings(tmp_path)
    del raw["run"]["dir"]
    monkeypatch.chdir(tmp_path)
    spec = make_spec(raw)
    assert spec.run_dir == tmp_path / "runs" / "tiny"
    assert spec.cache_dir == tmp_path / "runs" / ".cache"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.jsonl", True),
        ("org/a.parquet", True),
        ("./a", True),
        ("~/a", True),
        ("/a", True),
        ("org/a", False),
    ],
)
def test_paths_and_hub_names_are_told_apart_by_their_form(source: str, expected: bool) -> None:
    assert looks_local(source) is expected


@pytest.mark.parametrize(
    "blocks",
    [
        {},
        {"optimizer": {"name": "torch.optim.SGD", "kwargs": {"momentum": 0.9}, "lr": 3e-7}},
        {
            "callbacks": [
                "a.b:C",
                {"path": "a.b:D", "kwargs": {"x": [1, {"y": None}], "text": "1e-5"}},
            ]
        },
        {"run": {"name": "007"}, "wandb": {"group": "null"}},
        {"cluster": {"resources": {"CPU": 0.5, "GPU": 1}}},
        {"cluster": {"num_workers": [1, 4]}},
        {"reference": {"cache": "off"}},
        {
            "data": {
                "chat_template": "{{ '${a}' }}\n{% if b %}\\n: '\"{% endif %}",
                "chat_template_kwargs": {"c": False},
            }
        },
        {
            "data": {"max_length": None, "on_bad_row": "drop"},
            "training": {"max_steps": None, "epochs": 1.5},
        },
    ],
)
def test_saved_settings_load_as_they_were(tmp_path: Path, blocks: dict[str, Any]) -> None:
    spec, path = tiny_spec(tmp_path, **blocks), tmp_path / "config.yaml"
    save_spec(spec, path)
    assert load_spec(path) == spec
    assert "collective_timeout_s: 600" in path.read_text()  # defaults are written out
    assert not path.with_name("config.yaml.tmp").exists()


def test_saved_settings_keep_text_that_looks_like_an_interpolation(tmp_path: Path) -> None:
    spec, path = tiny_spec(tmp_path, wandb={"group": "${team}"}), tmp_path / "config.yaml"
    save_spec(spec, path)
    assert load_spec(path) == spec


def test_interpolation_within_the_files_works(tmp_path: Path) -> None:
    base = write_settings(tmp_path)
    second = yaml(tmp_path / "second.yaml", "wandb: {group: 'seed ${run.seed}'}\n")
    assert load_spec([base, second]).wandb.group == "seed 7"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: [1", "is not YAML"),
        ("- a\n- b\n", "has no top-level settings"),
        ("a: 1\na: 2\n", "is not YAML"),
        ("a: ${nowhere.b}", "cannot be merged"),
        (None, "does not exist"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, text: str | None, rule: str) -> None:
    path = tmp_path / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rule) as caught:
        load_spec(path)
    assert "bad.yaml" in str(caught.value)


@pytest.mark.parametrize("override", ["dpo.beta", "=3", "dpo.beta=[1"])
def test_a_bad_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError) as caught:
        load_spec(write_settings(tmp_path), [override])
    assert caught.value.key == "override"
    assert override in str(caught.value)


def test_every_wrong_setting_has_its_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        make_spec(
            raw_settings(
                tmp_path, optimizer={"lr": -1}, batch={"global_batch_size": 0}, precision="fp99"
            )
        )
    lines = str(caught.value).splitlines()
    assert sorted(line.split(" = ")[0] for line in lines) == [
        "batch.global_batch_size",
        "optimizer.lr",
        "precision",
    ]


def test_json_is_yaml(tmp_path: Path) -> None:
    path = yaml(tmp_path / "run.json", json.dumps(raw_settings(tmp_path)))
    assert load_spec(path) == tiny_spec(tmp_path)


@pytest.mark.parametrize(
    ("blocks", "key"),
    [
        ({"data": {"system_prompt": "a \ud83d"}}, "data.system_prompt"),
        ({"data": {"train": ["b.jsonl", "a\udcff.jsonl"]}}, "data.train"),
        (
            {"data": {"chat_template_kwargs": {"a": {"b": ["\ud83d"]}}}},
            "data.chat_template_kwargs.a.b",
        ),
        ({"data": {"chat_template_kwargs": {"\ud83d": 1}}}, "data.chat_template_kwargs"),
    ],
)
def test_text_that_is_not_unicode_is_refused_by_its_setting(
    tmp_path: Path, blocks: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError, match=r"is not Unicode text: .* is a lone surrogate") as caught:
        make_spec(raw_settings(tmp_path, **blocks))
    assert caught.value.key == key
    assert str(caught.value).isascii()


def test_settings_come_from_dicts_and_a_single_override(tmp_path: Path) -> None:
    raw = raw_settings(tmp_path)
    assert load_spec(raw, "dpo.beta=0.3").dpo.beta == 0.3
    assert load_spec([write_settings(tmp_path), {"dpo": {"beta": 0.4}}]).dpo.beta == 0.4
    assert load_spec(raw) == load_spec(write_settings(tmp_path))
