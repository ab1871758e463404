"""Bad settings and bad data, as a user gives them: exit code 2 and one line with key, value, rule
and cure, soon.
"""

import fcntl
import json
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from orchestrator.cli import main
from orchestrator.models.policy import build_policy, load_tokenizer
from support.command_line import orchestrator
from support.timeouts import scaled_timeout
from support.tiny_settings import TINY_MODEL, random_rows, raw_settings, tiny_spec

LIMIT_S, RAY_LIMIT_S = 30.0, 60.0  # wall time of a refusal, where other tests run beside it
MARK = "REFUSAL_TEST"  # an environment variable by which a process left behind is found
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
GONE: Any = object()  # an edit that removes a key
NO_INIT = {"model.init": GONE}

GOOD = random_rows(6)
CHAT = random_rows(6, conversational=True)
TIE = {"prompt": "a", "chosen": "b", "rejected": "b"}
LONG_PROMPT = {"prompt": "river " * 200, "chosen": "a", "rejected": "b"}
SAID, ASKED = {"role": "assistant", "content": "yes"}, {"role": "user", "content": "is it?"}
REJECTED = [{"role": "assistant", "content": "no"}]

seconds: dict[str, float] = {}  # wall time of every process, by its test


class Said(NamedTuple):
    """What the one line must hold: it begins with the key, and the cure stands at its end."""

    key: str
    value: str
    rule: str
    cure: str


class Given(NamedTuple):
    """What the user typed and wrote, besides the settings of raw_settings in run.yaml."""

    words: tuple[str, ...] = ()  # after run.yaml on the command line
    edits: dict[str, Any] = {}  # of run.yaml, by dotted key
    text: str | None = None  # of run.yaml, instead of any settings
    rows: list[Any] | None = None  # of train.jsonl; a string is written as it is
    files: dict[str, str] = {}  # by name
    model: str | None = None  # the name of a folder made by `models`
    # only the rank itself can know: weights were loaded, the collator ran, or it evaluated
    late: bool = False


def case(name: str, words: str, *said: str, **given: Any) -> Any:
    """One row of a table: `said` is key, value, rule, cure."""
    return pytest.param(
        Given(tuple(words.split("|")) if words else (), **given), Said(*said), id=name
    )


def write(folder: Path, given: Given) -> None:
    raw = raw_settings(folder)
    for dotted, value in given.edits.items():
        *blocks, key = dotted.split(".")
        block = raw
        for name in blocks:
            block = block.setdefault(name, {})
        if value is GONE:
            del block[key]
        else:
            block[key] = value
    (folder / "run.yaml").write_text(json.dumps(raw) if given.text is None else given.text)
    if given.rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in given.rows]
        (folder / "train.jsonl").write_text("".join(line + "\n" for line in lines))
    for name, text in given.files.items():
        (folder / name).write_text(text)


def assert_refused(code: int, stderr: str, said: Said) -> None:
    assert "Traceback" not in stderr, stderr
    assert code == 2, stderr
    (line,) = stderr.splitlines()
    assert line.startswith(f"error: {said.key}"), line
    missing = [part for part in said if part not in line]
    assert not missing, f"{missing} not in: {line}"
    assert said.cure in line.partition("; ")[2], line


def assert_nothing_runs(mark: str) -> None:
    """No process that inherited the mark is alive; Ray's daemons get a moment to end."""
    marked, deadline = f"{MARK}={mark}".encode(), time.monotonic() + scaled_timeout(10)
    while left := [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/environ")
        if marked in environment(path)
    ]:
        assert time.monotonic() < deadline, f"processes {left} were left behind"
        time.sleep(0.2)


def environment(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().split(b"\0")
    except OSError:  # it ended meanwhile, or is another user's
        return []


def in_a_process(
    name: str, folder: Path, *words: str, limit: float = LIMIT_S
) -> tuple[int, str, str]:
    """`orchestrator WORDS` in `folder`: exit code, stdout, stderr.

    Fails when it is slow or leaves a process behind.
    """
    mark, start = uuid.uuid4().hex, time.monotonic()
    done = orchestrator(*words, cwd=folder, env={**OFFLINE, MARK: mark}, timeout=limit)
    seconds[name] = time.monotonic() - start
    assert_nothing_runs(mark)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module", autouse=True)
def _on_one_worker() -> None:
    """What a module shares makes its tests share a worker (conftest), which so can tell the slowest
    of all.
    """


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Run]:
    """The same in this process, which has torch loaded already, in tmp_path."""
    mark = uuid.uuid4().hex
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
    assert_nothing_runs(mark)


# --- settings alone -------------------------------------------------------------------------------

NO_KEYS = ("settings file", "run.yaml", "has no top-level settings", "`run:`")
SETTINGS = [
    case(
        "key",
        "optimizer.learning_rate=1",
        "optimizer.learning_rate",
        "1",
        "is not a setting",
        "mean optimizer.lr?",
    ),
    case(
        "key-near",
        "batch.micro_batchsize=1",
        "batch.micro_batchsize",
        "1",
        "is not a setting",
        "mean batch.micro_batch_size?",
    ),
    case(
        "block",
        "optimiser.lr=1",
        "optimiser",
        "{'lr': 1}",
        "is not a setting",
        "did you mean optimizer?",
    ),
    case(
        "type-number",
        "optimizer.lr=fast",
        "optimizer.lr",
        "'fast'",
        "valid number",
        "learning rate",
    ),
    case(
        "type-integer",
        "batch.global_batch_size=8.5",
        "batch.global_batch_size",
        "8.5",
        "valid integer",
        "Pairs per",
    ),
    case(
        "trl-name",
        "learning_rate=1",
        "learning_rate = 1",
        "1",
        "is not a setting",
        "did you mean optimizer.lr?",
    ),
    case(
        "type-list",
        "callbacks=mine:Mine",
        "callbacks",
        "'mine:Mine'",
        "valid list",
        "callbacks=[mine:Mine]",
    ),
    case(
        "type-block",
        "optimizer=adam",
        "optimizer",
        "'adam'",
        "is a block of settings",
        "optimizer.name=adam?",
    ),
    case(
        "type-name",
        "scheduler.name=5",
        "scheduler.name = 5",
        "5",
        "string",
        "linear, cosine, constant",
    ),
    case("out-of-range", "dpo.beta=0", "dpo.beta", "0", "greater than 0", "Strength"),
    case(
        "no-name",
        "",
        "run.name",
        "(not set)",
        "is required",
        "Name of the run",
        edits={"run.name": GONE},
    ),
    case(
        "name-with-slash",
        "run.name=a/b",
        "run.name",
        "'a/b'",
        "must be 1 to 200 letters",
        "run.name=llama-dpo",
    ),
    case(
        "no-block", "", "batch", "(not set)", "is required", "Pairs per step", edits={"batch": GONE}
    ),
    case(
        "both-micro-batch-keys",
        "batch.max_tokens_per_microbatch=100",
        "batch",
        "'micro_batch_size': 2, 'max_tokens_per_microbatch': 100",
        "exactly one",
        "remove one",
    ),
    case(
        "no-micro-batch-key",
        "batch.micro_batch_size=null",
        "batch",
        "'micro_batch_size': None",
        "exactly one",
        "set batch.micro_batch_size=1",
    ),
    case(
        "micro-over-global",
        "batch.micro_batch_size=9",
        "batch.micro_batch_size",
        "9",
        "more than batch.global_batch_size (8)",
        "set it to 8 or less",
    ),
    case(
        "optimizer-near",
        "optimizer.name=torch.optim.AdmW",
        "optimizer.name",
        "'torch.optim.AdmW'",
        "is neither a supported optimizer of torch, bitsandbytes or deepspeed",
        "did you mean torch.optim.AdamW?",
    ),
    case(
        "optimizer-lbfgs",
        "optimizer.name=torch.optim.LBFGS",
        "optimizer.name",
        "'torch.optim.LBFGS'",
        "needs a closure",
        "use torch.optim.AdamW",
    ),
    case(
        "optimizer-of-trl",
        "optimizer.name=adamw_torch",
        "optimizer.name",
        "'adamw_torch'",
        "is neither a supported optimizer of torch",
        "did you mean torch.optim.AdamW?",
    ),
    case(
        "lr-in-kwargs",
        "optimizer.kwargs.lr=1",
        "optimizer.kwargs.lr",
        "1",
        "has its own setting",
        "set optimizer.lr instead",
    ),
    case(
        "scheduler-near",
        "scheduler.name=cosin",
        "scheduler.name",
        "'cosin'",
        "neither a schedule",
        "mean cosine?",
    ),
    case(
        "scheduler-plateau",
        "scheduler.name=torch.optim.lr_scheduler.ReduceLROnPlateau",
        "scheduler.name",
        "ReduceLROnPlateau",
        "needs a metric",
        "use linear, cosine",
    ),
    case(
        "kwargs-of-linear",
        "scheduler.kwargs.gamma=0.1",
        "scheduler.kwargs",
        "{'gamma': 0.1}",
        "linear has no arguments",
        "remove scheduler.kwargs",
    ),
    case(
        "evaluation-without-data",
        "data.eval=null|evaluation.every_steps=2",
        "evaluation.every_steps",
        "2",
        "needs evaluation pairs",
        "set data.eval",
    ),
    case(
        "two-models",
        "model.path=x",
        "model.path",
        "'x'",
        "model.init is also set",
        "remove one of the two",
    ),
    case(
        "no-model",
        "",
        "model.path",
        "(not set)",
        "either this or model.init is required",
        "or hub name of a causal LM, or set model.init",
        edits=NO_INIT,
    ),
    case(
        "small-vocabulary",
        "model.init.vocab_size=9",
        "model.init.vocab_size",
        "9",
        "256 bytes",
        "260 or more",
    ),
    case(
        "zero-stage-of-ddp",
        "engine.zero_stage=3",
        "engine.zero_stage",
        "3",
        "is not used by engine.kind ddp",
        "set engine.kind=deepspeed, or remove it",
    ),
    case(
        "deepspeed-file-says-otherwise",
        "engine.kind=deepspeed|engine.deepspeed_config=zero2.json",
        "engine.deepspeed_config.gradient_clipping",
        "0.5",
        "contradicts training.max_grad_norm = 1.0",
        'make them equal, or set "auto" in the file',
        files={"zero2.json": '{"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5}'},
    ),
    case(
        "no-deepspeed-file",
        "engine.kind=deepspeed|engine.deepspeed_config=zero2.json",
        "engine.deepspeed_config",
        "'zero2.json'",
        "cannot be read (No such file",
        "for example configs/deepspeed/zero2.json",
    ),
    case(
        "wandb-mode",
        "wandb.mode=ofline",
        "wandb.mode",
        "'ofline'",
        "auto, online, offline",
        "did you mean offline?",
    ),
    case(
        "wandb-off",
        "wandb.mode=off",
        "wandb.mode",
        "False",
        "auto, online, offline",
        "set wandb.mode=disabled",
    ),
    case(
        "name-above",
        "run.name=..",
        "run.name",
        "'..'",
        "start with a letter",
        "for example run.name=llama-dpo",
    ),
    case(
        "precision",
        "precision=bf61",
        "precision",
        "'bf61'",
        "must be one of auto, bf16",
        "did you mean bf16?",
    ),
    case(
        "callback-form",
        "callbacks=[mine.Mine]",
        "callbacks",
        "'mine.Mine'",
        "module:attr",
        "my_package.my_module:",
    ),
    case(
        "callback-key",
        "callbacks=[{path: 'mine:Mine', kwarg: {a: 1}}]",
        "callbacks.0.kwarg",
        "{'a': 1}",
        "is not a setting",
        "kwargs",
    ),
    case(
        "collator-form",
        "data.collator=mine",
        "data.collator",
        "'mine'",
        "module:attr",
        "my_package",
    ),
    case(
        "no-file", "no.yaml", "settings file", "no.yaml", "does not exist", "did you mean run.yaml?"
    ),
    case(
        "not-yaml",
        "",
        "settings file",
        "run.yaml",
        "line 2, column 9",
        "fix that line",
        text="run:\n  dir: b: c\n",
    ),
    case("empty-file", "", *NO_KEYS, text=""),
    case("list-file", "", *NO_KEYS, text="- a\n- b\n"),
    case(
        "interpolation",
        "run.name=${nope}",
        "settings",
        "run.yaml",
        "'nope' not found",
        "fix that key",
    ),
    case(
        "override-without-equals",
        "optimizer.lr",
        "override",
        "'optimizer.lr'",
        "form key=value",
        "example optimizer.lr=VALUE",
    ),
    case("override-without-key", "=3", "override", "'=3'", "key=value", "optimizer.lr=1e-6"),
]


@pytest.mark.parametrize(("given", "said"), SETTINGS)
def test_wrong_settings_are_refused(
    given: Given, said: Said, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write(tmp_path, given)
    code, _, stderr = in_a_process(
        request.node.callspec.id, tmp_path, "debug", "run.yaml", *given.words
    )
    assert_refused(code, stderr, said)
    assert not (tmp_path / "runs").exists()


def test_every_wrong_setting_has_its_line(tmp_path: Path) -> None:
    write(tmp_path, Given())
    code, _, stderr = in_a_process(
        "two wrong", tmp_path, "debug", "run.yaml", "optimizer.lr=fast", "dpo.beta=0"
    )
    assert code == 2
    heading, *lines = stderr.splitlines()
    assert heading == "errors:"
    assert sorted(line.partition(" = ")[0] for line in lines) == ["dpo.beta", "optimizer.lr"]


# --- data, models and the user's code -------------------------------------------------------------

KEYS_COLLATOR = (
    "import torch\ndef collate(rows):\n    return {'ids': torch.zeros(2 * len(rows), 3)}\n"
)
NONE_COLLATOR = "def collate(rows):\n    return None\n"
MASK_COLLATOR = (
    "import torch\ndef collate(rows):\n    ids = torch.ones(2 * len(rows), 4, dtype=torch.long)\n"
    "    return {'input_ids': ids, 'attention_mask': ids[:, :3], 'completion_mask': ids}\n"
)
NOT_A_CALLBACK = "class Mine:\n    pass\n"
MEND = "fix that row of train.jsonl, or set data.on_bad_row=drop to drop such rows"


def bad_row(name: str, row: Any, reason: str, cure: str = "") -> Any:
    """A row of the wrong shape, third of six; of a long one the line shows the beginning."""
    rows = [*GOOD[:2], row, *GOOD[3:]]
    return case(name, "", "data.train row 3", repr(row)[:100], reason, cure + MEND, rows=rows)


IN_A_PROCESS = [
    bad_row(
        "no-chosen",
        {"prompt": "a", "rejected": "b"},
        "has no column 'chosen'; its columns are 'prompt'",
    ),
    case(
        "collator-keys",
        "data.collator=mine:collate",
        "data.collator",
        "'mine:collate'",
        "returned {'ids': (4, 3)} for 2 pairs",
        "return tensors input_ids, attention_mask and completion_mask",
        files={"mine.py": KEYS_COLLATOR},
    ),
]

HERE = [
    *(
        case(
            f"no-{key}",
            f"model.init.config.{key}=0",
            f"model.init.config.{key}",
            "0",
            "must be 1 or more",
            "for example",
        )
        for key in ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size")
    ),
    case(
        "no-data",
        "data.train=nope.jsonl",
        "data.train",
        "nope.jsonl",
        "does not exist",
        "use a JSONL, JSON, CSV",
    ),
    case(
        "not-json",
        "",
        "data.train row 3",
        '{"prompt": "a", ',
        "is not JSON (",
        "fix that line of train.jsonl",
        rows=[*GOOD[:2], '{"prompt": "a", chosen}', *GOOD[3:]],
    ),
    case(
        "too-few-positions",
        "",
        "data.train row ",
        " tokens'",
        "longer than the model's 16 positions",
        "set data.max_length=16 or less",
        edits={"model.init.config.max_position_embeddings": 16},
    ),
    case(
        "no-callback",
        "callbacks=[nowhere:Mine]",
        "callbacks",
        "'nowhere:Mine'",
        "No module named",
        "install it",
    ),
    case(
        "scheduler-kwarg",
        "scheduler.name=torch.optim.lr_scheduler.StepLR|scheduler.kwargs.step=3",
        "scheduler.kwargs",
        "{'step': 3}",
        "unexpected keyword argument 'step'",
        "its arguments are step_size, gamma",
    ),
    case(
        "schedule-without-kwarg",
        "scheduler.name=cosine_with_min_lr",
        "scheduler.kwargs",
        "{}",
        "One of min_lr or min_lr_rate should be set through the scheduler.kwargs",
        "its arguments are num_cycles, min_lr, min_lr_rate",
    ),
    case(
        "wsd-without-kwarg",
        "scheduler.name=wsd",
        "scheduler.kwargs",
        "{}",
        "missing 1 required positional argument: 'num_decay_steps'",
        "its arguments are num_decay_steps, num_stable_steps",
    ),
    case(
        "optimizer-not-there",
        "optimizer.name=nowhere:Mine|engine.shard_optimizer=false",
        "optimizer.name",
        "'nowhere:Mine'",
        "No module named",
        "install it",
    ),
    case(
        "optimizer-is-none",
        "optimizer.name=mine:Mine|engine.shard_optimizer=false",
        "optimizer.name",
        "'Mine'",
        "is not a torch optimizer",
        "return a torch.optim.Optimizer",
        files={"mine.py": "class Mine:\n    def __init__(self, params, lr):\n        pass\n"},
    ),
    case(
        "optimizer-of-matrices",
        "optimizer.name=torch.optim.Muon",
        "optimizer.name",
        "'torch.optim.Muon'",
        "works only on 2-D weights",
        "set model.lora, whose weights are all 2-D",
        late=True,
    ),
    case(
        "hub-name-offline",
        "model.path=somebody/some-model",
        "model.path",
        "'somebody/some-model'",
        "cannot be loaded (",
        "that can be reached",
        edits=NO_INIT,
    ),
    case(
        "no-pad-token",
        "",
        "model.path",
        "no-pad",
        "without a pad token",
        "set model.pad_token='<|im_end|>'",
        model="no-pad",
    ),
    case(
        "no-eval-data",
        "data.eval=nope.jsonl",
        "data.eval",
        "nope.jsonl",
        "does not exist",
        "use a JSONL, JSON, CSV",
    ),
    case(
        "hub-data-offline",
        "data.train=some/pairs",
        "data.train",
        "'some/pairs'",
        "Couldn't reach",
        "can be reached",
    ),
    bad_row("not-an-object", [1], "is of type list, not an object"),
    bad_row(
        "text-and-messages",
        {"prompt": "a", "chosen": [SAID], "rejected": "b"},
        "mixes text and messages",
    ),
    bad_row(
        "message-without-content",
        {"prompt": [ASKED], "chosen": [{"role": "assistant"}], "rejected": REJECTED},
        "message 1 of chosen has no text in its content",
    ),
    bad_row(
        "completion-is-a-number",
        {"prompt": "a", "chosen": 1, "rejected": "b"},
        "chosen is int, neither text nor",
    ),
    bad_row(
        "tools-not-json",
        {"prompt": [ASKED], "chosen": [SAID], "rejected": REJECTED, "tools": "none"},
        "tools is not JSON (",
    ),
    case(
        "system-prompt-on-text",
        "data.system_prompt=Hello.",
        "data.train row 1",
        repr(GOOD[0])[:100],
        "is plain text, which does not use data.system_prompt",
        "remove data.system_prompt",
        rows=GOOD,
    ),
    bad_row(
        "tools-without-template",
        {"prompt": [ASKED], "chosen": [SAID], "rejected": REJECTED, "tools": '[{"name": "f"}]'},
        "has tools, not read by the chat template",
        "set data.chat_template to one that does, or ",
    ),
    case(
        "template-variable",
        "data.chat_template_kwargs.mesages=1",
        "data.chat_template_kwargs.mesages",
        "1",
        "is not read by the chat template",
        "did you mean messages?",
        rows=CHAT,
    ),
    case(
        "eval-row",
        "data.eval=held_out.jsonl",
        "data.eval row 1",
        "{'prompt': 'a'}",
        "has no column 'chosen'; its columns are 'prompt'",
        MEND.replace("train", "held_out"),
        files={"held_out.jsonl": '{"prompt": "a"}\n'},
    ),
    case(
        "all-ties",
        "",
        "data.train",
        "train.jsonl",
        "to train on (3 ties)",
        "chosen and rejected differ",
        rows=[TIE] * 3,
    ),
    case(
        "no-rows",
        "",
        "data.train",
        "train.jsonl",
        "it has no rows",
        "use a file with rows",
        rows=[],
    ),
    case(
        "json-cut-short",
        "data.train=a.json",
        "data.train",
        "a.json",
        "is not JSON",
        "fix",
        files={"a.json": "[{}"},
    ),
    case(
        "prompts-fill",
        "data.max_length=2",
        "data.train",
        "train.jsonl",
        "(32 prompts that fill data.max_length)",
        "raise data.max_length",
    ),
    case(
        "tie-is-an-error",
        "data.on_bad_row=error",
        "data.train row 7",
        repr(TIE)[:100],
        "chosen equals rejected",
        MEND,
        rows=[*GOOD, TIE],
    ),
    case(
        "long-prompt-is-an-error",
        "data.on_bad_row=error",
        "data.train row 7",
        repr(LONG_PROMPT)[:100],
        "its prompt alone has 201 tokens, data.max_length is 128",
        MEND,
        rows=[*GOOD, LONG_PROMPT],
    ),
    case(
        "no-such-attribute",
        "callbacks=[json:Mine]",
        "callbacks",
        "'json:Mine'",
        "json has no Mine",
        "after the colon",
    ),
    case(
        "not-a-callback",
        "callbacks=[mine:Mine]",
        "callbacks",
        "'mine:Mine'",
        "is not a transformers.TrainerCallback",
        "derive the class",
        files={"mine.py": NOT_A_CALLBACK},
    ),
    case(
        "callback-kwargs",
        "callbacks=[{path: 'transformers:EarlyStoppingCallback', kwargs: {patience: 3}}]",
        "callbacks",
        "EarlyStoppingCallback",
        "unexpected keyword argument 'patience'",
        "write its arguments as {path, kwargs}",
    ),
    case(
        "early-stopping-without-metric",
        "callbacks=[transformers:EarlyStoppingCallback]",
        "evaluation.metric_for_best",
        "(not set)",
        "EarlyStoppingCallback needs it",
        "evaluation.metric_for_best=loss",
    ),
    case(
        "no-collator",
        "data.collator=nowhere:mine",
        "data.collator",
        "'nowhere:mine'",
        "No module",
        "install it",
    ),
    case(
        "collator-not-callable",
        "data.collator=math:pi",
        "data.collator",
        "'math:pi'",
        "cannot be called (",
        "use a function of rows",
    ),
    case(
        "collator-returns-none",
        "data.collator=mine:collate",
        "data.collator",
        "'mine:collate'",
        "returned NoneType for 2 pairs",
        "return tensors input_ids, attention_mask and completion_mask",
        files={"mine.py": NONE_COLLATOR},
        late=True,
    ),
    case(
        "collator-mask-shape",
        "data.collator=mine:collate",
        "data.collator",
        "'mine:collate'",
        "'input_ids': (4, 4), 'attention_mask': (4, 3)",
        "completion_mask of shape [2 * pairs, tokens]",
        files={"mine.py": MASK_COLLATOR},
        late=True,
    ),
    case(
        "optimizer-kwarg",
        "optimizer.kwargs.momentum=0.9",
        "optimizer.kwargs",
        "{'momentum': 0.9}",
        "unexpected keyword argument 'momentum'",
        "its arguments are betas, eps",
    ),
    case(
        "optimizer-without-decay",
        "optimizer.name=torch.optim.Rprop|optimizer.weight_decay=0.1",
        "optimizer.weight_decay",
        "0.1",
        "torch.optim.Rprop does not support it",
        "set it to 0",
    ),
    case(
        "scheduler-of-torch",
        "scheduler.name=torch.optim.lr_scheduler.StpLR",
        "scheduler.name",
        "StpLR",
        "has no such name",
        "did you mean torch.optim.lr_scheduler.StepLR?",
    ),
    case(
        "run-dir-is-a-file",
        "run.dir=train.jsonl",
        "run.dir",
        "train.jsonl/tiny",
        "cannot be created (Not a",
        "set run.dir",
    ),
    case(
        "model-type",
        "model.init.model_type=qwen22",
        "model.init.model_type",
        "'qwen22'",
        "is not a causal LM of transformers",
        "did you mean qwen2?",
    ),
    case(
        "not-causal",
        "model.init.model_type=t5",
        "model.init.model_type",
        "'t5'",
        "is not a causal LM",
        "for example qwen2",
    ),
    case(
        "init-config-key",
        "model.init.config.hiden_size=32",
        "model.init.config.hiden_size",
        "32",
        "Qwen2Config has no such key",
        "did you mean hidden_size?",
    ),
    case(
        "init-config-type",
        "model.init.config.hidden_size=big",
        "model.init.config",
        "'hidden_size': 'big'",
        "Field 'hidden_size' expected int",
        "fix it",
    ),
    case(
        "init-heads",
        "model.init.config.num_attention_heads=5|model.init.config.num_key_value_heads=2",
        "model.init.config",
        "'num_attention_heads': 5",
        "heads in key and value must divide the number of heads",
        "fix its sizes",
        late=True,
    ),
    case(
        "init-vocabulary",
        "model.init.config.vocab_size=10",
        "model.init.config",
        "'hidden_size': 32",
        "the model's vocabulary has 10 tokens",
        "remove vocab_size from it",
    ),
    case(
        "metric-near",
        "evaluation.metric_for_best=losss",
        "evaluation.metric_for_best",
        "'losss'",
        "is not an evaluated metric",
        "did you mean loss?",
    ),
    case(
        "no-model-folder",
        "model.path=./nope",
        "model.path",
        "nope",
        "is not a folder",
        "existing folder or a hub name",
        edits=NO_INIT,
    ),
    case(
        "model-is-a-file",
        "model.path=run.yaml",
        "model.path",
        "run.yaml",
        "not a folder",
        "existing folder",
        edits=NO_INIT,
    ),
    case(
        "empty-model-folder",
        "",
        "model.path",
        "/empty",
        "cannot be loaded",
        "use a folder",
        model="empty",
    ),
    case(
        "no-weights",
        "",
        "model.path",
        "no-weights",
        "no file named model.safetensors",
        "folder",
        model="no-weights",
        late=True,
    ),
    case(
        "no-tokenizer",
        "model.tokenizer=./nope",
        "model.tokenizer",
        "nope",
        "is not a folder",
        "hub name",
        model="good",
    ),
    case(
        "no-end-token",
        "",
        "model.path",
        "no-end",
        "without an end token",
        "eos_token",
        model="no-end",
    ),
    case(
        "pad-token",
        "model.pad_token=zz",
        "model.pad_token",
        "'zz'",
        "is not in the",
        "one that is",
        model="no-pad",
    ),
    case(
        "no-template",
        "",
        "model.",
        "/no-template",
        "has no chat template",
        "instruct model's tokenizer",
        rows=CHAT,
        model="no-template",
    ),
    case(
        "no-reference",
        "reference.path=./nope",
        "reference.path",
        "nope",
        "is not a folder",
        "hub name",
        model="good",
    ),
    case(
        "reference-vocabulary",
        "reference.path={models}/large",
        "reference.path",
        "large",
        "a vocabulary of 320 tokens, the policy of 300",
        "the policy's tokenizer",
        model="good",
    ),
    case(
        "reference-tokenizer",
        "reference.path={models}/other-tokens",
        "reference.path",
        "other-tokens",
        "its tokenizer maps",
        "the policy's tokenizer",
        model="good",
    ),
    case(
        "no-adapter",
        "model.lora.adapter_path={models}/good",
        "model.lora.adapter_path",
        "good",
        "Can't find 'adapter_config.json'",
        "trained on this base model",
        model="good",
    ),
    case(
        "adapter-as-model",
        "",
        "model.path",
        "/adapter",
        "cannot be loaded",
        "set model.path to its base and model.lora.adapter_path to this",
        model="adapter",
    ),
    case(
        "all-layers-frozen",
        "model.num_frozen_layers=2",
        "model.num_frozen_layers",
        "2",
        "the model has 2 layers",
        "set it to 1 or less",
        model="good",
    ),
    case(
        "all-layers-shared",
        "reference.kind=shared_layers|reference.num_shared_layers=3",
        "reference.num_shared_layers",
        "3",
        "the model has 2 layers",
        "set it to 1 or less",
        model="good",
    ),
    case(
        "no-such-module",
        "model.lora.target_modules=[q_prj]",
        "model.lora.target_modules",
        "q_prj",
        "peft rejects it",
        "linear layers of this model",
        model="good",
        late=True,
    ),
    case(
        "adapter-on-embeddings",
        "model.lora.target_modules=[embed_tokens]",
        "model.lora.target_modules",
        "embed_tokens",
        "is part of the embeddings or the head",
        "linear layers below the head",
        model="good",
        late=True,
    ),
    case(
        "tokenizer-vocabulary",
        "model.tokenizer={models}/large",
        "model.tokenizer",
        "large",
        "the model's vocabulary has 300 tokens",
        "use the model's own tokenizer",
        model="good",
    ),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of tiny models: a good one, one with a larger vocabulary, and some with a part
    missing.
    """
    root = tmp_path_factory.mktemp("models")
    for name, vocab_size in (("good", 300), ("large", 320)):
        made_in = tmp_path_factory.mktemp(name)
        init = {"model_type": "qwen2", "vocab_size": vocab_size, "config": TINY_MODEL}
        spec = tiny_spec(made_in, model={"init": init})
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
    shutil.copytree(
        root / "good", root / "adapter"
    )  # what peft saves: the tokenizer and an adapter
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


def command(folder: Path, given: Given, models: Path) -> list[str]:
    """Write what was given, and the words that run it."""
    if given.model:
        given = given._replace(
            edits={**NO_INIT, "model.path": str(models / given.model), **given.edits}
        )
    write(folder, given)
    return ["debug", "run.yaml", *(word.replace("{models}", str(models)) for word in given.words)]


@pytest.mark.parametrize(("given", "said"), IN_A_PROCESS)
def test_wrong_data_are_refused(
    given: Given, said: Said, tmp_path: Path, models: Path, request: pytest.FixtureRequest
) -> None:
    code, _, stderr = in_a_process(
        request.node.callspec.id, tmp_path, *command(tmp_path, given, models)
    )
    assert_refused(code, stderr.replace(f"{tmp_path}/", ""), said)


@pytest.mark.parametrize(("given", "said"), HERE)
def test_wrong_data_are_refused_here(
    given: Given, said: Said, tmp_path: Path, models: Path, here: Run
) -> None:
    code, _, stderr = here(*command(tmp_path, given, models))
    assert_refused(code, stderr.replace(f"{tmp_path}/", ""), said)
    assert given.late or not (tmp_path / "runs" / "tiny" / "config.yaml").exists(), (
        "refused only after the run began"
    )


# --- rows that are dropped ------------------------------------------------------------------------

SILENT = {"prompt": [ASKED], "chosen": [SAID], "rejected": []}
MIXED = {"prompt": [ASKED], "chosen": [SAID], "rejected": "b"}
DROPPED = [
    pytest.param(
        "run.seed=7",
        [*GOOD, TIE, TIE, LONG_PROMPT, SILENT],
        [
            "2 dropped (ties)",
            "1 dropped (prompts that fill data.max_length)",
            "1 dropped (empty completions)",
        ],
        id="default",
    ),
    pytest.param(
        "data.on_bad_row=drop",
        [*GOOD, TIE, {"prompt": "a"}, 5, MIXED],
        ["1 dropped (ties)", "3 dropped (malformed rows)"],
        id="drop",
    ),
]


@pytest.mark.parametrize(("word", "rows", "counts"), DROPPED)
def test_dropped_rows_are_counted(
    word: str, rows: list[Any], counts: list[str], tmp_path: Path, here: Run
) -> None:
    write(tmp_path, Given(rows=rows))
    code, stdout, stderr = here("debug", "run.yaml", "training.max_steps=1", word)
    assert code == 0, stderr
    (line,) = [line for line in stdout.splitlines() if " training pairs" in line]
    assert line.startswith(f"{len(GOOD)} training pairs")
    assert [count for count in counts if count not in line] == []
    assert line.count("dropped") == len(counts)


# --- a run that is there already ------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path, here: Run) -> Path:
    """The directory of a finished run of one step, runs/tiny in tmp_path."""
    write(tmp_path, Given(edits={"training.max_steps": 1}))
    code, _, stderr = here("debug", "run.yaml")
    assert code == 0, stderr
    return tmp_path / "runs" / "tiny"


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_setting_is_refused_on_resume(
    finished: bool, trained: Path, tmp_path: Path, here: Run
) -> None:
    if not finished:
        shutil.rmtree(trained / "model")
        (trained / "result.json").unlink()
    words = ("debug", "run.yaml", "optimizer.lr=1e-4", "dpo.beta=0.2", "training.logging_steps=5")
    code, _, stderr = (
        here(*words) if finished else in_a_process("changed setting", tmp_path, *words)
    )
    for changed in ("dpo.beta (was 0.1, now 0.2)", "optimizer.lr (was 0.001, now 0.0001)"):
        assert_refused(
            code,
            stderr,
            Said("run.name", "'tiny'", changed, "restore them to resume it, or choose"),
        )
    assert "logging_steps" not in stderr  # it may change


def test_a_run_that_is_running_is_refused(tmp_path: Path) -> None:
    write(tmp_path, Given())
    run_dir = tmp_path / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    with open(run_dir / ".owner", "w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        owner.write("process 1 on elsewhere")
        owner.flush()
        code, _, stderr = in_a_process("running", tmp_path, "debug", "run.yaml")
    said = Said(
        "run.name",
        "'tiny'",
        "is running already (process 1 on elsewhere)",
        "wait for it, or choose",
    )
    assert_refused(code, stderr, said)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (("verify", "nowhere"), "does not exist"),
        (("export", ".", "out"), "so it is not the directory of a run"),
    ],
    ids=["verify", "export"],
)
def test_a_folder_that_is_no_run_is_refused(
    words: tuple[str, ...], rule: str, tmp_path: Path
) -> None:
    code, _, stderr = in_a_process(f"{words[0]} of no run", tmp_path, *words)
    assert_refused(
        code, stderr, Said("RUN_DIR", repr(words[1]), rule, "use the folder run.dir/run.name")
    )
    assert list(tmp_path.iterdir()) == []


def test_an_export_without_checkpoint_is_refused(trained: Path, tmp_path: Path, here: Run) -> None:
    shutil.rmtree(trained / "checkpoints")
    code, _, stderr = here("export", "runs/tiny", "out")
    assert_refused(
        code,
        stderr,
        Said("RUN_DIR", "'runs/tiny'", "has no complete checkpoint", "train it further first"),
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "rule"),
    [("notes", "is a folder with other files"), ("run.yaml", "is a file")],
    ids=["folder", "file"],
)
def test_an_export_over_other_things_is_refused(
    out: str, rule: str, trained: Path, tmp_path: Path, here: Run
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep me")
    before = (tmp_path / "run.yaml").read_text()
    code, _, stderr = here("export", str(trained), out)
    assert_refused(code, stderr, Said("OUT", repr(out), rule, "choose a new folder"))
    assert (tmp_path / "notes" / "mine.txt").read_text() == "keep me"
    assert (tmp_path / "run.yaml").read_text() == before


# --- the cluster ----------------------------------------------------------------------------------


def test_more_workers_than_cores_are_refused_before_ray_starts(tmp_path: Path) -> None:
    write(tmp_path, Given())
    cores = os.cpu_count()
    code, _, stderr = in_a_process(
        "cores", tmp_path, "train", "run.yaml", "cluster.num_workers=1000"
    )
    rule = f"1 CPU each, but this machine has {cores} CPUs"
    assert_refused(
        code, stderr, Said("cluster.num_workers", "1000", rule, f"set cluster.num_workers={cores}")
    )
    assert not (tmp_path / "runs" / "tiny" / "config.yaml").exists()


def test_resources_that_name_nothing_are_refused(tmp_path: Path) -> None:
    write(tmp_path, Given())
    words = ("train", "run.yaml", "cluster.resources.CPU=0")
    code, _, stderr = in_a_process("no resources", tmp_path, *words, limit=RAY_LIMIT_S)
    assert_refused(
        code, stderr, Said("cluster.resources", "{'CPU': 0.0}", "requests no resources", "{CPU: 1}")
    )


@pytest.mark.ray
def test_a_cluster_that_is_too_small_is_refused(tmp_path: Path) -> None:
    write(tmp_path, Given())
    words = ("train", "run.yaml", "cluster.resources.GPU=64")
    code, _, stderr = in_a_process("gpus", tmp_path, *words, limit=RAY_LIMIT_S)
    rule = "workers need 64 GPU each, placed PACK, but the nodes of the cluster can hold"
    assert_refused(code, stderr, Said("cluster.num_workers", "1", rule, "lower cluster.resources"))


def test_slowest_refusals_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:3]
    with capsys.disabled():
        print(
            "\nslowest refusals: " + ", ".join(f"{name} {seconds[name]:.1f} s" for name in slowest)
        )
