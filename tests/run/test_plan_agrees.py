"""`plan` accepts what a run accepts and refuses what it refuses, by the same key: on generated
settings, models and files of data.
"""

import contextlib
import copy
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.run.local.debug import debug
from orchestrator.run.plan import planned
from orchestrator.settings.errors import TrainingError, UserError
from orchestrator.settings.load import make_spec
from orchestrator.world import World
from support.tiny_parts import ALONE, tiny_model, tokenizer
from support.tiny_settings import TINY_MODEL, random_rows

Rows = list[Any]
Raw = dict[str, Any]

# --- settings -------------------------------------------------------------------------------------

PATCHES: list[Raw] = [
    *(
        {"dpo": {"loss_type": name}}
        for name in ("ipo", "robust", "aot", "simpo", ["sigmoid", "sft"], "sigmond")
    ),
    {"dpo": {"loss_type": "exo_pair", "label_smoothing": 0.001}},
    {"dpo": {"loss_type": "support.user_losses:logistic"}},
    {"dpo": {"loss_type": "support.user_losses:nothere"}},
    {"dpo": {"loss_type": "json:dumps"}},
    {"dpo": {"label_smoothing": 0.2}},
    {"dpo": {"beta": 0}},
    {"dpo": {"use_weighting": True}},
    {"batch": {"micro_batch_size": None, "max_tokens_per_microbatch": 64}},
    {"batch": {"micro_batch_size": 99}},
    {"batch": {"global_batch_size": 3}},
    {"optimizer": {"lr": 5e7}},
    {"optimizer": {"name": "torch.optim.SGD", "kwargs": {"momentum": 0.9}}},
    {"optimizer": {"name": "torch.optim.SGD", "kwargs": {"moment": 0.9}}},
    {"optimizer": {"name": "torch.optim.Muon"}},
    {"optimizer": {"name": "torch.optim.Rprop", "weight_decay": 0.1}},
    {"optimizer": {"name": "torch.optim.LBFGS"}},
    {"optimizer": {"name": "torch.optim:SGD"}, "engine": {"shard_optimizer": False}},
    {"optimizer": {"name": "json:nothere"}, "engine": {"shard_optimizer": False}},
    {"optimizer": {"name": "json:dumps"}, "engine": {"shard_optimizer": False}},
    {"scheduler": {"name": "cosine", "warmup_steps": 50}},
    {"scheduler": {"name": "cosine_with_min_lr"}},
    {"scheduler": {"name": "cosine_with_min_lr", "kwargs": {"min_lr_rate": 0.1}}},
    {"scheduler": {"name": "wsd"}},
    {"scheduler": {"name": "torch.optim.lr_scheduler.StepLR", "kwargs": {"step_size": 1}}},
    {"scheduler": {"name": "torch.optim.lr_scheduler.StepLR"}},
    {
        "scheduler": {
            "name": "torch.optim.lr_scheduler.OneCycleLR",
            "kwargs": {"max_lr": 1.0, "total_steps": 1},
        }
    },
    {"training": {"max_steps": 9, "epochs": 1}},
    {"training": {"max_steps": None, "epochs": 0.1}},
    {"training": {"gradient_checkpointing": True}},
    {"precision": "fp64"},
    {"precision": "bf16"},
    {"engine": {"kind": "fsdp"}},
    {"engine": {"kind": "fsdp"}, "reference": {"sharded": True}},
    {"engine": {"zero_stage": 2}},
    {"reference": {"kind": "shared_layers", "num_shared_layers": 1}},
    {"reference": {"kind": "shared_layers", "num_shared_layers": 2}},
    {"reference": {"kind": "adapter_off"}},
    {"reference": {"kind": "adapter_off"}, "model": {"lora": {"r": 2}}},
    {"reference": {"kind": "precomputed"}},
    {"reference": {"kind": "int8", "max_reward_error": 1e-12}},
    {"reference": {"dtype": "bf16"}},
    {"reference": {"dtype": "bf16", "max_reward_error": 1e-12}},
    {"reference": {"sync_every": 1}},
    {"reference": {"cache": "full"}},
    {"reference": {"path": "MODELS/other_tokens"}},
    {"reference": {"path": "MODELS/sound"}},
    {"reference": {"path": "MODELS/wider"}, "model": {"init": None, "path": "MODELS/sound"}},
    {
        "reference": {"path": "MODELS/wider", "sync_every": 1},
        "model": {"init": None, "path": "MODELS/sound"},
    },
    {"reference": {"path": "./nowhere"}},
    {"model": {"lora": {"r": 2}}},
    {"model": {"lora": {"target_modules": ["q_proj"]}}},
    {"model": {"lora": {"target_modules": ["no_such_layer"]}}},
    {"model": {"lora": {"target_modules": ["lm_head"]}}},
    {"model": {"lora": {"adapter_path": "MODELS/sound"}}},
    {"model": {"num_frozen_layers": 1}},
    {"model": {"num_frozen_layers": 2}},
    {"model": {"attention": "padded"}},
    {
        "model": {
            "init": {"model_type": "gpt2", "config": {"n_embd": 32, "n_layer": 2, "n_head": 4}}
        }
    },
    {
        "model": {
            "init": {"model_type": "gpt2", "config": {"n_embd": 32, "n_layer": 2, "n_head": 5}}
        }
    },
    {"model": {"init": {"model_type": "qwen9", "config": {}}}},
    {"model": {"init": {"config": {"num_hiden_layers": 2}}}},
    {"model": {"init": {"config": {"vocab_size": 100}}}},
    {"model": {"init": {"config": {"max_position_embeddings": 16}}}},
    {"data": {"max_length": 4}},
    {"data": {"max_length": None}},
    {"data": {"truncation": "keep_end", "max_length": 16}},
    {"data": {"max_completion_length": 1}},
    {"data": {"on_bad_row": "drop"}},
    {"data": {"on_bad_row": "error"}},
    {"data": {"weight_column": "weight"}},
    {"data": {"margin_column": "margin"}},
    {"data": {"system_prompt": "Be brief."}},
    {"data": {"chat_template_kwargs": {"mood": "calm"}}},
    {"data": {"chat_template": "{{ messages[0]['content'] }}{% if nope %}"}},
    {"data": {"collator": "support.user_collators:plain"}},
    {"data": {"collator": "support.user_collators:nothere"}},
    {"data": {"collator": "builtins:len"}},
    {"data": {"eval_fraction": 0.25}, "DROP": "eval"},
    {"data": {"eval_fraction": 0.0001}, "DROP": "eval"},
    {"DROP": "eval"},
    {"DROP": "eval", "evaluation": {"every_steps": 1}},
    {"evaluation": {"batch_size": 2}},
    {"evaluation": {"logits": True}},
    {"evaluation": {"metric_for_best": "loss"}, "checkpoint": {"export": "best"}},
    {"evaluation": {"metric_for_best": "reward"}},
    {"evaluation": {"compute_metrics": "json:dumps"}},
    {"evaluation": {"compute_metrics": "builtins:dict", "metric_for_best": "loss"}},
    {"evaluation": {"compute_metrics": "json:nothere"}},
    {"callbacks": ["transformers:EarlyStoppingCallback"]},
    {"callbacks": ["transformers:TrainerCallback"]},
    {"callbacks": ["json:dumps"]},
    {"callbacks": ["tensorbord"]},
]
NAMES = (
    "sound",
    "no_pad",
    "no_end",
    "no_tokenizer",
    "empty",
    "cut_weights",
    "no_weights",
    "larger_ids",
    "no_template",
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models, sound and damaged, by NAMES and others."""
    folder = tmp_path_factory.mktemp("models")
    for name in (*NAMES, "wider", "other_tokens"):
        altered = copy.deepcopy(tokenizer())
        size = {"wider": {"intermediate_size": 96}, "larger_ids": {"vocab_size": 200}}.get(name, {})
        tiny_model(**{"vocab_size": 260, **size}).save_pretrained(folder / name)
        altered.pad_token = None if name == "no_pad" else altered.pad_token
        altered.eos_token = None if name == "no_end" else altered.eos_token
        altered.chat_template = None if name == "no_template" else altered.chat_template
        if name == "other_tokens":
            altered.add_tokens(["<more>"])
        if name != "no_tokenizer":
            altered.save_pretrained(folder / name)
    weights = folder / "cut_weights" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    (folder / "no_weights" / "model.safetensors").unlink()
    shutil.rmtree(folder / "empty")
    (folder / "empty").mkdir()
    return folder


# --- data -----------------------------------------------------------------------------------------

GOOD = random_rows(6, longest=4)
TALK = random_rows(6, conversational=True, longest=4)
DATA: dict[str, Rows] = {
    "text": GOOD,
    "conversations": TALK,
    "both": [*GOOD[:3], *TALK[:3]],
    "tie": [*GOOD, {"prompt": "Say", "chosen": " a", "rejected": " a"}],
    "only ties": [{"prompt": "Say", "chosen": " a", "rejected": " a"}] * 3,
    "nothing": [],
    "a number": [*GOOD, {"prompt": "Say", "chosen": 3, "rejected": " a"}],
    "a null": [*GOOD, {"prompt": "Say", "chosen": None, "rejected": " a"}],
    "other columns": [{"question": "Say", "good": " a", "bad": " b"}] * 3,
    "without prompt": [{"chosen": f"Say {i} a", "rejected": f"Say {i} b"} for i in range(3)],
    "weights": [{**row, "weight": 2.0, "margin": 0.5} for row in GOOD],
    "a weight of 0": [*({**row, "weight": 1.0} for row in GOOD), {**GOOD[0], "weight": 0.0}],
    "a long row": [*GOOD, {"prompt": "Say " * 80, "chosen": " a", "rejected": " b"}],
    "a long answer": [*GOOD, {"prompt": "Say", "chosen": " a" * 200, "rejected": " b"}],
    "an empty answer": [*GOOD, {"prompt": "Say", "chosen": "", "rejected": " b"}],
    "no role": [*TALK, {**TALK[0], "chosen": [{"content": "a"}]}],
    "one prompt": [{**row, "prompt": "Say"} for row in GOOD],
    "a list": [*GOOD, ["Say", "a", "b"]],
}


def write_lines(path: Path, content: Rows) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def write_array(path: Path, content: Rows) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(content))
    return path


def write_parquet(path: Path, content: Rows) -> Path:
    path = path.with_suffix(".parquet")
    try:
        pq.write_table(pa.Table.from_pylist(content), path)
    except (pa.ArrowException, AttributeError):  # rows that no column can hold
        return write_lines(path, content)
    return path


def write_cut(path: Path, content: Rows) -> Path:
    path = write_lines(path, content)
    path.write_text(path.read_text()[:-9])
    return path


def write_latin(path: Path, content: Rows) -> Path:
    path = write_lines(path, content)
    path.write_bytes(path.read_bytes() + '{"prompt": "é"}'.encode("latin-1"))
    return path


def write_nothing(path: Path, content: Rows) -> Path:
    return path.with_suffix(".jsonl")


WRITERS: list[Callable[[Path, Rows], Path]] = [write_lines, write_array, write_parquet]
BROKEN: list[Callable[[Path, Rows], Path]] = [write_cut, write_latin, write_nothing]


@dataclass(frozen=True)
class Case:
    """Settings, as patches to those of a sound run, and what the two files of data hold."""

    patches: tuple[Raw, ...]
    model: str | None
    train: str
    eval: str
    write: Callable[[Path, Rows], Path]

    def spec(self, folder: Path, models: Path) -> Raw:
        """Write the data and return the settings, which may be wrong."""
        raw: Raw = {
            "run": {"dir": str(folder / "runs"), "name": "tiny"},
            "model": {
                "init": {
                    "vocab_size": 300,
                    "config": {**TINY_MODEL, "max_position_embeddings": 128},
                }
            },
            "data": {"train": str(self.write(folder / "train", DATA[self.train]))},
            "batch": {"global_batch_size": 4, "micro_batch_size": 2},
            "training": {"max_steps": 1, "logging_steps": 1},
            "precision": "fp32",
            "wandb": {"mode": "disabled"},
        }
        raw["data"] |= {
            "eval": str(write_lines(folder / "eval", DATA[self.eval])),
            "max_length": 96,
            "num_proc": 1,
        }
        if self.model is not None:
            raw["model"] = {"path": str(models / self.model)}
        for patch in self.patches:
            raw = merged(raw, patch)
        for name in [raw.pop("DROP", "")]:
            raw["data"].pop(name, None)
        return json.loads(json.dumps(raw).replace("MODELS", str(models)))


def merged(raw: Raw, patch: Raw) -> Raw:
    """Return the settings with a patch, block by block."""
    both = {**raw, **patch}
    for name in raw.keys() & patch.keys():
        if isinstance(raw[name], dict) and isinstance(patch[name], dict):
            both[name] = merged(raw[name], patch[name])
    return both


usually = st.sampled_from(["text", "text", "conversations"])
CASES = st.builds(
    Case,
    patches=st.lists(st.sampled_from(PATCHES), max_size=3).map(tuple),
    model=st.one_of(st.none(), st.just("sound"), st.sampled_from(NAMES)),
    train=st.one_of(usually, st.sampled_from(sorted(DATA))),
    eval=st.one_of(usually, usually, st.sampled_from(sorted(DATA))),
    write=st.one_of(
        st.sampled_from(WRITERS), st.sampled_from(WRITERS), st.sampled_from([*WRITERS, *BROKEN])
    ),
)


# --- both -----------------------------------------------------------------------------------------


def outcome(function: Callable[[], Any]) -> str:
    """Return the key of what a call is refused with; nothing where it is accepted."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function()
    except UserError as error:
        return error.key
    except TrainingError as error:
        return f"training: {error}"
    return ""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Leave the process group that an engine has made for itself."""
    try:
        yield
    finally:
        World(0, 1, 0, ALONE.device).leave()


def check(case: Case, models: Path) -> None:
    """Require that plan and run agree on a case."""
    with tempfile.TemporaryDirectory() as name, alone():
        folder = Path(name)
        raw = case.spec(folder, models)
        try:
            spec = make_spec(copy.deepcopy(raw))
        except UserError:
            return  # both validate the settings first
        plans, runs = outcome(lambda: planned(spec)), outcome(lambda: debug(spec))
        assert plans == runs, raw


@pytest.mark.slow
@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(case=CASES)
def test_plan_and_run_agree(models: Path, case: Case) -> None:
    check(case, models)


@settings(
    max_examples=15,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(case=CASES)
def test_plan_and_run_agree_on_a_few(models: Path, case: Case) -> None:
    check(case, models)
