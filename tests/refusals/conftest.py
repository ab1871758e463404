"""Run a command in this process, and damaged models for it."""

import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrator.cli import main
from orchestrator.models.policy import build_policy, load_tokenizer
from support.refusals import MARK, OFFLINE, Run, assert_nothing_runs
from support.tiny_settings import TINY_MODEL, tiny_spec


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Run]:
    """Run commands in this process, which has loaded torch already, in tmp_path."""
    mark = uuid.uuid4().hex
    environment = dict(os.environ)  # to which `train` adds for Ray
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, value in {**OFFLINE, MARK: mark}.items():
        monkeypatch.setenv(name, value)

    def run(*words: str) -> tuple[int, str, str]:
        sys.modules.pop("mine", None)
        capfd.readouterr()
        code = main(words)
        stdout, stderr = capfd.readouterr()
        return code, stdout, stderr

    yield run
    os.environ.clear()
    os.environ.update(environment)
    assert_nothing_runs(mark)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models: a good one, one with a larger vocabulary, and some with a part
    missing.
    """
    root = tmp_path_factory.mktemp("models")
    for name, vocab_size in (("good", 300), ("large", 320)):
        folder = tmp_path_factory.mktemp(name)
        init = {"model_type": "qwen2", "vocab_size": vocab_size, "config": TINY_MODEL}
        spec = tiny_spec(folder, model={"init": init})
        tokenizer = load_tokenizer(spec)
        build_policy(spec, tokenizer, torch.float32).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for name in ("no-pad", "no-end", "no-template", "no-weights"):
        shutil.copytree(root / "good", root / name)
    shutil.copytree(root / "good", root / "other-tokens")
    vocabulary = root / "other-tokens" / "tokenizer.json"
    content = json.loads(vocabulary.read_text())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    vocabulary.write_text(json.dumps(content))
    # what peft saves: the tokenizer and an adapter
    shutil.copytree(root / "good", root / "adapter")
    (root / "adapter" / "config.json").unlink()
    (root / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"})
    )
    for name, key in (("no-pad", "pad_token"), ("no-end", "eos_token")):
        config = root / name / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), key: None}))
    (root / "no-template" / "chat_template.jinja").unlink()
    (root / "no-weights" / "model.safetensors").unlink()
    (root / "empty").mkdir()
    return root
