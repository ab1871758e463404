"""The quickstart of the README: Ray Train, two workers, evaluation before and after, all in its
place.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from orchestrator.cli import DONE, STOPPED, main
from orchestrator.training.samples import greedy_answers
from support.command_line import orchestrator
from support.debug_runs import run_debug
from support.repository import ROOT
from support.run_callbacks import stops_at
from support.run_files import metric_lines


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, shared_ray: dict[str, str]
) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("quickstart")
    words = [
        ROOT / "configs/quickstart.yaml",
        ROOT / "configs/place/ray-local.yaml",
        f"run.dir={folder}",
    ]
    ended = orchestrator("train", *words, cwd=ROOT, env=shared_ray)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    return folder / "quickstart", ended.stdout


@pytest.mark.ray
def test_quickstart_learns(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    lines = metric_lines(run_dir)
    before, after = lines[0], lines[-1]
    assert (before["step"], after["step"]) == (0, 420)
    assert before["eval_rewards/accuracies"] == before["eval_rewards/margins"] == 0.0  # all ties
    assert before["eval_loss"] > 5.0 > 1.0 > after["eval_loss"]  # mostly that of sft
    assert after["eval_rewards/accuracies"] > 0.9


@pytest.mark.ray
def test_quickstart_prints_where_its_files_are(finished: tuple[Path, str]) -> None:
    run_dir, out = finished
    for place in ("model", "metrics.jsonl", "wandb"):
        assert str(run_dir / place) in out
        assert (run_dir / place).exists()
    assert len(list(run_dir.glob("wandb/offline-run-*/run-*.wandb"))) == 1


@pytest.mark.ray
def test_the_model_loads_and_prefers_the_chosen(finished: tuple[Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, _ = finished
    assert "dpo" in (run_dir / "model" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    question = "Can you say that the lamp is in the kitchen, in French?"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True
    )

    def logp(answer: str) -> float:
        ids = torch.tensor([prompt["input_ids"] + tokenizer(answer)["input_ids"]])
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        return float(logps.gather(-1, ids[0, 1:, None])[len(prompt["input_ids"]) - 1 :].sum())

    assert logp("La lampe est dans la cuisine.") > logp("The lamp is in the kitchen.")


@pytest.mark.ray
def test_the_model_answers_prompts_it_has_not_seen_with_the_chosen_completion(
    finished: tuple[Path, str],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir, out = finished
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    rows = [
        json.loads(line) for line in (ROOT / "configs/sample/eval.jsonl").read_text().splitlines()
    ]
    values = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        for row in rows
    ]
    answers = greedy_answers(model, tokenizer, values[:64], torch.device("cpu"))
    chosen = [row["chosen"][0]["content"] for row in rows]
    assert sum(answer == right for answer, right in zip(answers, chosen, strict=False)) > 16
    for row, answer in zip(rows[:2], answers, strict=False):
        assert f"prompt   {row['prompt'][0]['content']}\nbefore   " in out
        assert f"\nafter    {answer}\n" in out


@pytest.mark.ray
def test_the_same_command_again_does_nothing(
    finished: tuple[Path, str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which main() adds the current folder
    monkeypatch.chdir(ROOT)
    run_dir, out = finished
    files = ["configs/quickstart.yaml", "configs/place/ray-local.yaml"]
    assert main(["train", *files, f"run.dir={run_dir.parent}"]) == DONE
    output, _, summary = capsys.readouterr().out.partition("\n\n")
    assert re.fullmatch(
        r"quickstart has finished already, on [-\d]+ [:\d]+: nothing to do; .*", output
    )
    assert out.endswith("\n" + summary)


@pytest.mark.ray
def test_verify_and_export(
    finished: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which main() adds the current folder
    run_dir, _ = finished
    assert main(["verify", str(run_dir)]) == DONE
    assert capsys.readouterr().out.count(": complete") == 2
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--dtype", "bf16"]) == DONE
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 1_000_000

    broken = tmp_path / "broken"
    shutil.copytree(run_dir, broken)
    shard = sorted(broken.glob("checkpoints/step_*/rank_00001.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # one flipped bit
    shard.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", str(broken)]) == 1
    assert "is not what was written" in capsys.readouterr().out
    # from the checkpoint before
    assert main(["export", str(broken), str(tmp_path / "older")]) == DONE
    assert "Optimizer steps | 280" in (tmp_path / "older" / "README.md").read_text()


@pytest.mark.ray
def test_debug_gives_the_same_losses(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    words = [
        f"run.dir={run_dir.parent}",
        "run.name=debug",
        "wandb.mode=disabled",
        stops_at(40),
    ]
    settings = Path(shutil.copy(ROOT / "configs/quickstart.yaml", run_dir.parent))
    ended = run_debug(settings, *words, cwd=ROOT)
    assert ended.codes == [STOPPED], ended.log
    values = {line["step"]: line for line in metric_lines(run_dir.parent / "debug")}
    # 40 steps; then learning sets in, and amplifies rounding beyond any bound
    for line in metric_lines(run_dir)[:5]:
        for name in ("loss", "eval_loss"):
            assert values[line["step"]].get(name, 0) == pytest.approx(line.get(name, 0), abs=1e-5)
