"""Settings that contradict their schema or each other are refused before anything is loaded."""

from pathlib import Path

import pytest

from support.refusals import (
    GONE,
    NO_INIT,
    Refusal,
    Run,
    UserInput,
    assert_refused,
    case,
    run_in_process,
    write_input,
)

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


@pytest.mark.parametrize(("user_input", "refusal"), SETTINGS)
def test_wrong_settings_are_refused(
    user_input: UserInput, refusal: Refusal, tmp_path: Path, run_here: Run
) -> None:
    write_input(tmp_path, user_input)
    code, _, stderr = run_here("debug", "run.yaml", *user_input.words)
    assert_refused(code, stderr, refusal)
    assert not (tmp_path / "runs").exists()


def test_a_process_refuses_wrong_settings_with_code_2_and_one_line(tmp_path: Path) -> None:
    write_input(tmp_path, UserInput())
    words = ("debug", "run.yaml", "optimizer.learning_rate=1")
    code, stdout, stderr = run_in_process(tmp_path, *words)
    refusal = Refusal("optimizer.learning_rate", "1", "is not a setting", "mean optimizer.lr?")
    assert_refused(code, stderr, refusal)
    assert stdout == ""


def test_every_wrong_setting_has_its_line(tmp_path: Path, run_here: Run) -> None:
    write_input(tmp_path, UserInput())
    code, _, stderr = run_here("debug", "run.yaml", "optimizer.lr=fast", "dpo.beta=0")
    assert code == 2
    heading, *lines = stderr.splitlines()
    assert heading == "errors:"
    assert sorted(line.partition(" = ")[0] for line in lines) == ["dpo.beta", "optimizer.lr"]
