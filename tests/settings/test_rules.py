"""Settings that cannot stand together are refused; each rule names key, value, rule and cure."""

import math
from pathlib import Path
from typing import Any

import pytest

from orchestrator.settings.errors import UserError
from support.repository import ROOT
from support.tiny_settings import refused, tiny_spec


@pytest.mark.parametrize(
    ("blocks", "key", "words"),
    [
        (
            {"model": {"init": None}},
            "model.path",
            ["either this or model.init is required", "set model.init"],
        ),
        ({"model": {"path": "x"}}, "model.path", ["= 'x'", "model.init is also set", "remove one"]),
        ({"model": {"init": {"vocab_size": 259}}}, "model.init.vocab_size", ["259", "260 or more"]),
        (
            {"batch": {"micro_batch_size": None}},
            "batch",
            ["exactly one of the two", "batch.micro_batch_size=1"],
        ),
        ({"batch": {"max_tokens_per_microbatch": 9}}, "batch", ["exactly one of the two"]),
        (
            {"batch": {"micro_batch_size": 9}},
            "batch.micro_batch_size",
            ["= 9", "batch.global_batch_size (8)"],
        ),
        ({"training": {"epochs": 0, "max_steps": None}}, "training.epochs", ["greater than 0"]),
        (
            {"optimizer": {"name": "torch.optim.AdamV"}},
            "optimizer.name",
            ["did you mean torch.optim.Adam"],
        ),
        ({"optimizer": {"name": "Adam"}}, "optimizer.name", ["did you mean torch.optim.Adam?"]),
        (
            {"optimizer": {"name": "adamw_torch"}},
            "optimizer.name",
            ["did you mean torch.optim.AdamW?"],
        ),
        (
            {"optimizer": {"name": "paged_adamw_8bit"}},
            "optimizer.name",
            ["did you mean bitsandbytes.optim.PagedAdamW8bit?"],
        ),
        (
            {"optimizer": {"name": "bitsandbytes.optim.AdamW"}},
            "optimizer.name",
            ["did you mean bitsandbytes.optim.AdamW8bit?"],
        ),
        (
            {"optimizer": {"name": "torch.optim.Prodigy"}},
            "optimizer.name",
            ["use one of torch.optim.Adadelta, Adag"],
        ),
        ({"optimizer": {"name": "prodigyopt:"}}, "optimizer.name", ["module:attr"]),
        (
            {"optimizer": {"name": "torch.optim.LBFGS"}},
            "optimizer.name",
            ["needs a closure", "use torch.optim.AdamW"],
        ),
        (
            {"optimizer": {"name": "torch.optim.SparseAdam"}},
            "optimizer.name",
            ["only on sparse gradients"],
        ),
        ({"optimizer": {"kwargs": {"lr": 1}}}, "optimizer.kwargs.lr", ["set optimizer.lr instead"]),
        (
            {"optimizer": {"kwargs": {"weight_decay": 1}}},
            "optimizer.kwargs.weight_decay",
            ["optimizer.weight_decay"],
        ),
        ({"optimizer": {"lr": 0}}, "optimizer.lr", ["= 0", "greater than 0", "Peak learning rate"]),
        ({"scheduler": {"name": "liner"}}, "scheduler.name", ["did you mean linear?"]),
        (
            {"scheduler": {"name": "StepLR"}},
            "scheduler.name",
            ["did you mean torch.optim.lr_scheduler.StepLR?"],
        ),
        (
            {"scheduler": {"name": "sine"}},
            "scheduler.name",
            ["= 'sine'", "neither a schedule of", "did you mean"],
        ),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.ReduceLROnPlateau"}},
            "scheduler.name",
            ["needs a metric"],
        ),
        (
            {"scheduler": {"name": "reduce_lr_on_plateau"}},
            "scheduler.name",
            ["needs a metric", "use linear"],
        ),
        ({"scheduler": {"name": "greedy"}}, "scheduler.name", ["needs a metric", "use linear"]),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.SequentialLR"}},
            "scheduler.name",
            ["needs other schedulers as arguments", "from Python", "optimizers=(None,"],
        ),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.LambdaLR"}},
            "scheduler.name",
            ["a function", "from Python"],
        ),
        (
            {"scheduler": {"warmup_steps": 3, "warmup_ratio": 0.1}},
            "scheduler.warmup_ratio",
            ["= 0.1", "remove one"],
        ),
        (
            {"scheduler": {"warmup_ratio": 1.5}},
            "scheduler.warmup_ratio",
            ["less than 1", "a fraction of all steps"],
        ),
        (
            {"scheduler": {"name": "cosine", "kwargs": {"num_warmup_steps": 3}}},
            "scheduler.kwargs.num_warmup_steps",
            ["= 3", "set scheduler.warmup_steps instead"],
        ),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.StepLR", "warmup_steps": 3}},
            "scheduler.warmup_steps",
            ["= 3", "is not used by"],
        ),
        (
            {"scheduler": {"name": "torch.optim.lr_scheduler.StepLR", "warmup_ratio": 0.1}},
            "scheduler.warmup_ratio",
            ["= 0.1", "is not used by"],
        ),
        (
            {"scheduler": {"kwargs": {"gamma": 1}}},
            "scheduler.kwargs",
            ["linear has no arguments", "remove scheduler.kwargs"],
        ),
        (
            {"data": {"eval": None}, "evaluation": {"every_steps": 3}},
            "evaluation.every_steps",
            ["set data.eval"],
        ),
        (
            {"data": {"eval": None}, "evaluation": {"metric_for_best": "x"}},
            "evaluation.metric_for_best",
            ["data.eval"],
        ),
        (
            {"data": {"max_prompt_length": 128}},
            "data.max_prompt_length",
            [
                "= 128",
                "leaves no room for a completion in data.max_length (128)",
                "lower it, or raise data.max_length",
            ],
        ),
        (
            {"data": {"max_completion_length": 129}},
            "data.max_completion_length",
            ["= 129", "is more than data.max_length (128)", "raise data.max_length"],
        ),
        (
            {"data": {"chat_template_kwargs": {"add_generation_prompt": False}}},
            "data.chat_template_kwargs.add_generation_prompt",
            ["= False", "not a template variable", "remove it"],
        ),
        (
            {"data": {"chat_template": "nowhere"}},
            "data.chat_template",
            ["= 'nowhere'", "cannot be read (No such file"],
        ),
        (
            {"data": {"chat_template": str(ROOT / "LICENSE")}},
            "data.chat_template",
            ["is not a Jinja template: it has neither"],
        ),
        (
            {"data": {"system_prompt": ""}},
            "data.system_prompt",
            ["at least 1 character", "a system message"],
        ),
        (
            {"data": {"eval": None}, "evaluation": {"at_start": False}},
            "evaluation.at_start",
            ["= False", "data.eval"],
        ),
        ({"data": {"eval": {"a b": "x"}}}, "data.eval", ["= 'a b'", "letters, digits, _ and -"]),
        (
            {"data": {"eval": {"entropy": "x"}}},
            "data.eval",
            ["= 'entropy'", "the name of a metric", "rename that set"],
        ),
        (
            {"data": {"eval": {"easy": 3}}},
            "data.eval.easy",
            ["= 3", "is a block of settings", "path, name, split"],
        ),
        ({"data": {"eval": 3}}, "data.eval", ["= 3", "one source, or {NAME: source}"]),
        (
            {"data": {"eval_fraction": 0.1}},
            "data.eval_fraction",
            ["= 0.1", "data.eval is also set", "remove one of the two"],
        ),
        (
            {"data": {"margin_column": "m"}, "dpo": {"loss_type": ["ipo", "sft"]}},
            "data.margin_column",
            ["= 'm'", "is used by sigmoid, hinge", "not by ipo, sft"],
        ),
        (
            {"dpo": {"loss_type": ["sigmoid", "mine:"]}},
            "dpo.loss_type",
            ["'mine:'", "not of the form module:attr"],
        ),
        (
            {"dpo": {"router_aux_loss_coef": 0.1}},
            "dpo.router_aux_loss_coef",
            ["= 0.1", "is not supported", "set it to 0"],
        ),
        (
            {"data": {"eval": None, "eval_fraction": 1}},
            "data.eval_fraction",
            ["= 1", "less than 1", "held out"],
        ),
        ({"data": {"train": []}}, "data.train", ["= []", "at least 1 item", "JSONL"]),
        (
            {"data": {"train": [{"path": "a", "weight": 0}]}},
            "data.train.0.weight",
            ["= 0", "greater than 0", "How often"],
        ),
        (
            {"data": {"train": ["a", {"path": "/b.jsonl", "split": "odd"}]}},
            "data.train.1.split",
            ["= 'odd'", "/b.jsonl is a file, which has no split", "remove it"],
        ),
        (
            {"data": {"eval": {"easy": {"path": "b.json", "name": "x"}}}},
            "data.eval.easy.name",
            ["= 'x'", "is a file"],
        ),
        ({"data": {"eval": {}}}, "data.eval", ["= {}", "one source, or {NAME: source}"]),
        (
            {"evaluation": {"compute_metrics": "mine"}},
            "evaluation.compute_metrics",
            ["= 'mine'", "module:attr"],
        ),
        (
            {"evaluation": {"eval_strategy": "epoch"}},
            "evaluation.eval_strategy",
            ["evaluation.every_epoch=true?"],
        ),
        (
            {"evaluation": {"early_stopping": {"patience": 2}}},
            "evaluation.early_stopping",
            [
                "'patience': 2",
                "needs evaluation.metric_for_best",
                "evaluation.metric_for_best=loss",
            ],
        ),
        (
            {"evaluation": {"early_stopping": {"patience": 0}}},
            "evaluation.early_stopping.patience",
            ["= 0"],
        ),
        (
            {"checkpoint": {"export": "best"}},
            "checkpoint.export",
            ["= 'best'", "needs evaluation.metric_for_best"],
        ),
        (
            {"checkpoint": {"load_best_model_at_end": True}},
            "checkpoint.load_best_model_at_end",
            ["export=best?"],
        ),
        ({"callbacks": ["my_module"]}, "callbacks", ["module:attr", "my_module"]),
        ({"callbacks": [{"path": ":attr"}]}, "callbacks", ["module:attr"]),
        ({"data": {"collator": "my.collator"}}, "data.collator", ["module:attr"]),
        (
            {"data": {"collator": "my:collator"}, "reference": {"cache": "full"}},
            "reference.cache",
            ["= 'full'", "data.collator", "ref_chosen_logps"],
        ),
        (
            {"data": {"collator": "my:collator"}, "reference": {"kind": "precomputed"}},
            "reference.kind",
            ["= 'precomputed'", "data.collator", "not known in advance", "ref_chosen_logps"],
        ),
        (
            {"model": {"lora": {}, "num_frozen_layers": 1}},
            "model.num_frozen_layers",
            ["= 1", "model.lora already freezes every layer of the base", "remove one"],
        ),
        (
            {"model": {"lora": {"adapter_path": "a/b", "r": 4, "target_modules": ["q_proj"]}}},
            "model.lora",
            [
                "= {'r': 4, 'target_modules': ['q_proj']}",
                "model.lora.adapter_path already determines these",
                "remove them",
            ],
        ),
        (
            {"reference": {"kind": "shared_layers"}},
            "reference.num_shared_layers",
            ["(not set)", "kind shared_layers needs the number", "half of the model's layers"],
        ),
        (
            {"reference": {"num_shared_layers": 1}},
            "reference.num_shared_layers",
            [
                "= 1",
                "is not used by kind copy",
                "set reference.kind=shared_layers; model.num_frozen_layers",
            ],
        ),
        (
            {"reference": {"kind": "shared_layers", "num_shared_layers": 1, "path": "a/b"}},
            "reference.path",
            ["= 'a/b'", "which another model does not have", "reference.kind=copy"],
        ),
        (
            {
                "reference": {"kind": "shared_layers", "num_shared_layers": 1},
                "model": {"num_frozen_layers": 2},
            },
            "model.num_frozen_layers",
            ["= 2", "reference.num_shared_layers is 1", "remove it"],
        ),
        (
            {
                "reference": {"kind": "shared_layers", "num_shared_layers": 1},
                "model": {"disable_dropout": False},
            },
            "model.disable_dropout",
            ["= False", "with kind shared_layers the policy's dropout", "set it to true"],
        ),
        (
            {"reference": {"kind": "adapter_off"}, "model": {"lora": {}, "disable_dropout": False}},
            "model.disable_dropout",
            ["= False", "with kind adapter_off the policy's dropout", "reference.kind=copy"],
        ),
        (
            {"reference": {"kind": "adapter_off", "path": "a/b"}, "model": {"lora": {}}},
            "reference.path",
            ["= 'a/b'", "uses the policy's own base", "reference.kind=copy"],
        ),
        (
            {"reference": {"kind": "int8", "dtype": "bf16"}},
            "reference.dtype",
            ["= 'bf16'", "kind int8 determines the type of the weights", "reference.kind=copy"],
        ),
        (
            {"reference": {"kind": "precomputed", "dtype": "bf16"}},
            "reference.dtype",
            ["= 'bf16'", "the policy itself computes the log-probs, in its own type", "remove it"],
        ),
        (
            {"reference": {"kind": "nf4", "offload": True}},
            "reference.offload",
            ["= True", "kind nf4 has no copy of the weights on the device", "reference.kind=copy"],
        ),
        (
            {"reference": {"max_reward_error": 0.1}},
            "reference.max_reward_error",
            ["= 0.1", "so no error is measured", "remove it"],
        ),
        (
            {"reference": {"sync_every": 2}, "model": {"lora": {}}},
            "reference.sync_every",
            ["= 2", "averaging the factors of two adapters", "train without model.lora"],
        ),
        (
            {"reference": {"sync_every": 2, "kind": "int8"}},
            "reference.sync_every",
            ["= 2", "weights in int8 cannot represent small updates", "set reference.kind=copy"],
        ),
        (
            {"reference": {"sync_every": 2, "kind": "precomputed"}},
            "reference.sync_every",
            ["= 2", "computed once belong to one fixed reference", "set reference.kind=copy"],
        ),
        (
            {"reference": {"sync_every": 2, "cache": "full"}},
            "reference.sync_every",
            ["= 2", "wrong once the reference is updated", "set reference.cache=off"],
        ),
        (
            {
                "reference": {"sync_every": 2, "sharded": True},
                "engine": {"kind": "deepspeed", "zero_stage": 3},
                "precision": "bf16",
            },
            "reference.sync_every",
            ["= 2", "deepspeed shards in bf16 loses small updates", "reference.sharded=false"],
        ),
        (
            {
                "reference": {"sync_every": 2, "sharded": True},
                "engine": {"kind": "deepspeed", "zero_stage": 3},
                "precision": "auto",
            },
            "reference.sync_every",
            ["= 2", "in 16 bits, as precision=auto may choose, loses", "precision=fp32"],
        ),
        (
            {
                "model": {"lora": {"base": "bf16"}},
                "data": {"collator": "my_code:collate"},
                "precision": "fp64",
            },
            "model.lora.base",
            ["= 'bf16'", "precision fp64 would compute with weights rounded to this type"],
        ),
        (
            {"model": {"attention": "varlen"}, "precision": "tf32"},
            "model.attention",
            ["= 'varlen'", "precision bf16 or fp16, not tf32", "precision=bf16", "attention=auto"],
        ),
        (
            {"reference": {"sync_every": 2, "sync_alpha": 1.5}},
            "reference.sync_alpha",
            ["1.5", "less than or equal to 1"],
        ),
        (
            {"reference": {"kind": "int4"}},
            "reference.kind",
            ["must be one of copy, shared_layers", "set reference.kind=nf4"],
        ),
        ({"reference": {"cache": "lasy"}}, "reference.cache", ["did you mean lazy?"]),
        ({"model": {"attention": "pad"}}, "model.attention", ["did you mean padded?"]),
        ({"precision": "bf61"}, "precision", ["'bf61'", "must be one of", "did you mean bf16?"]),
        (
            {"dpo": {"loss_type": "hing"}},
            "dpo.loss_type",
            ["must be one of sigmoid, hinge", "did you mean hinge?"],
        ),
        (
            {"dpo": {"loss_type": ["sigmoid", "stf"]}},
            "dpo.loss_type",
            ["'stf'", "must be one of", "did you mean sft?"],
        ),
        (
            {"dpo": {"loss_type": []}},
            "dpo.loss_type",
            ["= []", "must be one of", "set it to sigmoid"],
        ),
        ({"dpo": {"loss_type": None}}, "dpo.loss_type", ["must be one of", "set it to sigmoid"]),
        (
            {"dpo": {"loss_type": "rpo"}},
            "dpo.loss_type",
            ["set dpo.loss_type=[sigmoid, sft] and dpo.loss_weights=[1, "],
        ),
        (
            {"dpo": {"rpo_alpha": 1}},
            "dpo.rpo_alpha",
            ["did you mean dpo.loss_type=[sigmoid, sft] with dpo.loss_weig"],
        ),
        (
            {"dpo": {"loss_weights": [1, 2]}},
            "dpo.loss_weights",
            [
                "[1.0, 2.0]",
                "is not one number for each of sigmoid",
                "set 1 number, or remove it: then each is 1",
            ],
        ),
        ({"dpo": {"loss_weights": ["inf"]}}, "dpo.loss_weights.0", ["'inf'", "finite"]),
        ({"dpo": {"loss_weights": [0]}}, "dpo.loss_weights", ["= [0.0]", "nothing would train"]),
        ({"dpo": {"beta": math.inf}}, "dpo.beta", ["= inf", "a finite number"]),
        (
            {"dpo": {"loss_type": "mine.py:loss"}},
            "dpo.loss_type",
            ["names a file", "did you mean mine:loss?"],
        ),
        (
            {"data": {"collator": "./my/own.py:f"}},
            "data.collator",
            ["names a file", "did you mean my.own:f?"],
        ),
        (
            {"dpo": {"label_smoothing": 0.1}},
            "dpo.label_smoothing",
            [
                "is used by exo_pair, robust, aot, aot_unpaired, cdpo, simpo, not by sigmoid",
                "set dpo.loss_type=cdpo",
            ],
        ),
        (
            {"dpo": {"label_smoothing": 0.1, "loss_type": ["ipo", "sft"]}},
            "dpo.label_smoothing",
            ["not by ipo, sft"],
        ),
        (
            {"dpo": {"loss_type": "exo_pair"}},
            "dpo.label_smoothing",
            ["= 0.0", "its logarithm", "set it to 0.001"],
        ),
        (
            {"dpo": {"loss_type": "robust", "label_smoothing": 0.5}},
            "dpo.label_smoothing",
            ["= 0.5", "robust divides by 1 - 2 * dpo.label_smoothing", "set it below 0.5"],
        ),
        (
            {"dpo": {"loss_type": "cdpo", "label_smoothing": 1}},
            "dpo.label_smoothing",
            ["less than 1"],
        ),
        (
            {"dpo": {"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"}},
            "dpo.f_divergence_type",
            ["'forward_kl'", "not for nca_pair", "set dpo.loss_type to one of sigmoid, hinge"],
        ),
        (
            {"dpo": {"f_divergence_type": "js"}},
            "dpo.f_divergence_type",
            ["must be one of reverse_kl, forward_kl, js_divergence, alpha_divergence"],
        ),
        (
            {"dpo": {"f_alpha_divergence_coef": 0.3}},
            "dpo.f_alpha_divergence_coef",
            ["= 0.3", "is not used by reverse_kl", "set dpo.f_divergence_type=alpha_divergence"],
        ),
        ({"dpo": {"ld_alpha": 1.1}}, "dpo.ld_alpha", ["= 1.1", "less than or equal to 1"]),
        (
            {"dpo": {"ld_alpha": 0.5, "loss_type": "sft"}},
            "dpo.ld_alpha",
            ["is not used by sft", "remove it"],
        ),
        (
            {"dpo": {"use_weighting": True, "loss_type": ["sigmoid", "aot"]}},
            "dpo.use_weighting",
            ["weights single pairs, but sigmoid, aot compares sorted pairs", "remove it"],
        ),
        (
            {"dpo": {"loss_type": "aot_unpaired"}, "model": {"disable_dropout": False}},
            "model.disable_dropout",
            ["= False", "aot_unpaired runs the policy twice per step", "set it to true"],
        ),
        (
            {"dpo": {"discopop_tau": 0.1}},
            "dpo.discopop_tau",
            ["is not used by sigmoid", "dpo.loss_type=discopop"],
        ),
        (
            {"dpo": {"simpo_gamma": 1.0}},
            "dpo.simpo_gamma",
            ["is not used by sigmoid", "set dpo.loss_type=simpo"],
        ),
        ({"run": {"name": "a/b"}}, "run.name", ["'a/b'", "must be 1 to 200 letters, digits"]),
        ({"run": {"name": None}}, "run.name", ["(not set)"]),
        ({"run": {"seed": -1}}, "run.seed", ["-1"]),
        (
            {"slurm": {"time": "soon"}},
            "slurm.time",
            ["'soon'", "D-HH:MM:SS, HH:MM:SS or MM:SS, or a number of seconds"],
        ),
        ({"slurm": {"time": True}}, "slurm.time", ["True", "D-HH:MM:SS"]),
        (
            {"slurm": {"time": 60}},
            "slurm.signal_s",
            ["= 300", "not less than slurm.time (0:01:00)", "raise slurm.time"],
        ),
        ({"slurm": {"time": "5:00"}}, "slurm.signal_s", ["not less than slurm.time (5:00)"]),
        (
            {"slurm": {"args": ["-x"]}},
            "slurm.args",
            ["= '-x'", "is not a flag", "slurm.args=[--mem=0]"],
        ),
        (
            {"slurm": {"args": ["--export=A=b,C=d"]}},
            "slurm.args",
            ["= '--export=A=...'", "in the run directory"],
        ),
        (
            {
                "slurm": {"workers_per_node": 1},
                "cluster": {"num_workers": 2, "placement": "STRICT_PACK"},
            },
            "slurm.workers_per_node",
            ["= 1", "all 2 workers on one node", "cluster.placement=PACK"],
        ),
        (
            {
                "slurm": {"workers_per_node": 2},
                "cluster": {"num_workers": 2, "placement": "STRICT_SPREAD"},
            },
            "slurm.workers_per_node",
            ["= 2", "each worker on its own node", "remove it"],
        ),
        (
            {"cluster": {"num_workers": "many"}},
            "cluster.num_workers",
            ["'many'", "integer of 1 or more, or [fewest,"],
        ),
        (
            {"cluster": {"num_workers": 0}},
            "cluster.num_workers",
            ["= 0", "1 or more", "cluster.num_workers=1"],
        ),
        ({"cluster": {"num_workers": True}}, "cluster.num_workers", ["= True", "integer"]),
        (
            {"cluster": {"num_workers": [2, 1]}},
            "cluster.num_workers",
            ["= [2, 1]", "[fewest, most]"],
        ),
        ({"cluster": {"num_workers": [2]}}, "cluster.num_workers", ["= [2]", "[fewest, most]"]),
        (
            {"cluster": {"num_workers": [1, 2]}, "optimizer": {"name": "torch.optim.Adafactor"}},
            "cluster.num_workers",
            ["= [1, 2]", "only on the same number of ranks", "set cluster.num_workers=2"],
        ),
        (
            {"engine": {"kind": "zero"}},
            "engine.kind",
            ["= 'zero'", "must be one of ddp, deepspeed, fsdp"],
        ),
        (
            {"engine": {"zero_stage": 3}},
            "engine.zero_stage",
            ["= 3", "is not used by engine.kind ddp", "set engine.kind=deepspeed, or remove it"],
        ),
        (
            {"engine": {"kind": "fsdp", "deepspeed_config": {"zero_optimization": {"stage": 2}}}},
            "engine.deepspeed_config",
            ["= {'zero_optimization'", "is not used by engine.kind fsdp", "engine.kind=deepspeed"],
        ),
        (
            {"engine": {"deepspeed_config": 3}},
            "engine.deepspeed_config",
            ["= 3", "valid dictionary", "A DeepSpeed config"],
        ),
        (
            {"engine": {"overlap_comm": False}},
            "engine.overlap_comm",
            ["= False", "set engine.kind=deepspeed"],
        ),
        (
            {"engine": {"kind": "deepspeed", "reshard_after_forward": False}},
            "engine.reshard_after_forward",
            ["= False", "is not used by engine.kind deepspeed", "set engine.kind=fsdp"],
        ),
        (
            {"engine": {"kind": "fsdp", "shard_optimizer": False}},
            "engine.shard_optimizer",
            ["= False", "is not used by engine.kind fsdp", "set engine.kind=ddp"],
        ),
        (
            {"engine": {"kind": "fsdp", "bucket_size": 9}},
            "engine.bucket_size",
            ["= 9", "reduces gradients layer by layer", "remove it"],
        ),
        (
            {"engine": {"offload": "optimizer"}},
            "engine.offload",
            ["= 'optimizer'", "ddp does not support offload", "set engine.kind=deepspeed"],
        ),
        (
            {"engine": {"kind": "fsdp", "offload": "optimizer"}},
            "engine.offload",
            ["= 'optimizer'", "stored with the weights", "set engine.offload=parameters"],
        ),
        (
            {"engine": {"kind": "deepspeed", "offload": "parameters"}},
            "engine.offload",
            [
                "= 'parameters'",
                "deepspeed at stage 2 keeps the whole weights",
                "set engine.zero_stage=3, or engine.offload=op",
            ],
        ),
        (
            {"engine": {"offload": "parameters"}},
            "engine.offload",
            ["= 'parameters'", "ddp keeps the whole weights", "set engine.kind=fsdp, or"],
        ),
        (
            {"engine": {"kind": "deepspeed"}, "precision": "fp64"},
            "precision",
            ["= 'fp64'", "in fp32", "set engine.kind=ddp or fsdp, or precision=fp32"],
        ),
        (
            {
                "engine": {"kind": "fsdp"},
                "model": {"lora": {"base": "nf4"}},
                "reference": {"kind": "adapter_off"},
            },
            "model.lora.base",
            [
                "= 'nf4'",
                "fsdp cannot shard quantised weights",
                "engine.zero_stage=2, or model.lora.base=bf16",
            ],
        ),
        (
            {"reference": {"sharded": True}},
            "reference.sharded",
            ["= True", "ddp does not shard weights", "set engine.kind=fsdp"],
        ),
        (
            {"reference": {"sharded": True}, "engine": {"kind": "deepspeed"}},
            "reference.sharded",
            ["deepspeed at stage 2 does not shard weights"],
        ),
        (
            {"reference": {"sharded": True, "kind": "int8"}, "engine": {"kind": "fsdp"}},
            "reference.sharded",
            ["kind int8 has no weights to shard", "set reference.kind=copy"],
        ),
        (
            {"reference": {"sharded": True, "dtype": "bf16"}, "engine": {"kind": "fsdp"}},
            "reference.sharded",
            ["have the policy's type, not bf16", "remove it, or reference.dtype"],
        ),
        (
            {"reference": {"sharded": True, "offload": True}, "engine": {"kind": "fsdp"}},
            "reference.sharded",
            ["engine.offload decides where shards are stored", "remove it, or reference.offload"],
        ),
        (
            {
                "engine": {"kind": "deepspeed"},
                "optimizer": {"name": "deepspeed.ops.adam.DeepSpeedCPUAdam"},
            },
            "optimizer.name",
            [
                "weights in host memory",
                "set engine.offload=optimizer, or use deepspeed.ops.adam.FusedAdam",
            ],
        ),
        (
            {
                "engine": {"kind": "deepspeed", "offload": "optimizer"},
                "optimizer": {"name": "deepspeed.ops.adam.FusedAdam"},
            },
            "optimizer.name",
            [
                "weights on the GPU",
                "engine.offload is optimizer",
                "use deepspeed.ops.adam.DeepSpeedCPUAdam",
            ],
        ),
        ({"cluster": {"resources": {"GPU": -1}}}, "cluster.resources.GPU", ["-1"]),
        (
            {"run": "tiny"},
            "run",
            ["'tiny'", "is a block of settings", "did you mean run.name=tiny?"],
        ),
        (
            {"cluster": {"resources": {"CPU": 0}}},
            "cluster.resources",
            ["requests no resources", "for example {CPU: 1}"],
        ),
        ({"wandb": {"mode": False}}, "wandb.mode", ["set wandb.mode=disabled"]),
        ({"callbacks": "a.b:C"}, "callbacks", ["for example callbacks=[a.b:C]"]),
    ],
)
def test_each_rule_names_key_value_rule_and_cure(
    tmp_path: Path, blocks: dict[str, Any], key: str, words: list[str]
) -> None:
    error = refused(tmp_path, **blocks)
    assert error.key == key
    assert str(error).startswith(f"{key} = ")
    assert "\n" not in str(error)
    assert error.cure
    for word in words:
        assert word in str(error)


SETS = {"easy": "a.jsonl", 2024: "b.jsonl"}  # as YAML reads a bare number


@pytest.mark.parametrize(
    ("best", "sets", "has_more", "says"),
    [
        ("loss", None, False, None),
        ("eval_rewards/margins", None, False, None),
        (
            "rewards/accuracy",
            None,
            False,
            "is not an evaluated metric; did you mean rewards/accuracies?",
        ),
        ("rewards/accuracy", None, True, None),
        ("easy_loss", SETS, False, None),
        ("eval_2024_rewards/margins", SETS, False, None),
        ("eval_loss", SETS, False, "is not an evaluated metric; did you mean "),
        ("easy_mine", SETS, False, "is not an evaluated metric; "),
        ("easy_mine", SETS, True, None),
        (
            "mine",
            SETS,
            True,
            "is not an evaluated metric; for example evaluation.metric_for_best=easy_loss",
        ),
    ],
)
def test_metric_for_best_must_be_an_evaluated_metric(
    tmp_path: Path, best: str, sets: Any, has_more: bool, says: str | None
) -> None:
    data = {"data": {"eval": sets}} if sets else {}
    spec = tiny_spec(tmp_path, evaluation={"metric_for_best": best}, **data)
    if says is None:
        spec.evaluation.check_metric_for_best(spec.data.eval_sets, has_more)
        return
    with pytest.raises(UserError) as caught:
        spec.evaluation.check_metric_for_best(spec.data.eval_sets, has_more)
    assert caught.value.key == "evaluation.metric_for_best"
    assert says in str(caught.value)
