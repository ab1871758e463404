"""References of LoRA policies equal TRL's."""

from typing import Any

import pytest
import torch

from orchestrator.models.policy import build_policy
from orchestrator.settings.run import RunSpec
from support.reference_parity import (
    LORA_LR,
    WEIGHTS_TOLERANCE,
    Home,
    Weights,
    assert_trls,
    beyond,
    exactly,
    ours,
    parameters,
    trained,
    weights,
)
from support.training_parity import worst
from support.trl_trainer import need_trl

need_trl()


def our_names(weights: Weights) -> Weights:
    """The trained factors by the names that we have for them."""
    values = {
        name.removeprefix("base_model.model."): value
        for name, value in weights.items()
        if ".default." in name
    }
    return {name.replace(".default.", ".policy."): value for name, value in values.items()}


def trained_factors(spec: RunSpec) -> Weights:
    return {name: value for name, value in weights(spec).items() if ".policy." in name}


@pytest.mark.parametrize(
    "lora",
    [{"r": 4, "alpha": 12, "target_modules": ["q_proj", "v_proj", "down_proj"]}, {}],
    ids=["chosen", "default"],
)
def test_lora_without_its_adapter_is_lora_with_a_copy_and_trls(
    home: Home, lora: dict[str, Any]
) -> None:
    from peft import LoraConfig

    name, model = f"lora_{len(lora)}", {"lora": lora}
    spec = home.spec(name, LORA_LR, model=model, reference={"kind": "adapter_off"})
    actual, exact = ours(spec), exactly(spec)

    copied = home.spec(f"{name}_copy", LORA_LR, model=model)
    assert beyond(ours(copied), actual, 1e-6) == []
    assert worst(trained_factors(copied), trained_factors(spec)) < 1e-6

    targets = lora.get("target_modules", "all-linear")
    config = LoraConfig(
        r=lora.get("r", 16), lora_alpha=lora.get("alpha", 32), target_modules=targets
    )
    trainer = home.trl(home.loaded(), LORA_LR, peft_config=config)
    theirs, start = (
        our_names(parameters(trainer.model)),
        build_policy(spec, home.tokenizer, torch.float32),
    )
    for name, value in theirs.items():
        value.copy_(start.get_parameter(name).detach())
    assert theirs.keys() == trained_factors(spec).keys()
    assert_trls(actual, trained(trainer), exact)
    assert worst(trained_factors(spec), theirs) < WEIGHTS_TOLERANCE


def test_continuing_an_adapter_equals_trl(home: Home) -> None:
    """TRL makes a second adapter, named ref: the reference is not the bare base."""
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        lora_dropout=0.2,
        use_rslora=True,
        target_modules=["q_proj", "o_proj", "up_proj"],
    )
    adapted = get_peft_model(home.loaded(), config)
    draw = torch.Generator().manual_seed(3)
    for name, p in adapted.named_parameters():
        if "lora_B" in name:  # of zeros: it has learned nothing yet
            p.data = 0.1 * torch.randn(p.shape, generator=draw)
    adapted.save_pretrained(home.folder / "adapter")
    model = {"lora": {"adapter_path": str(home.folder / "adapter")}}

    trainer = home.trl(
        PeftModel.from_pretrained(home.loaded(), home.folder / "adapter", is_trainable=True),
        LORA_LR,
    )
    trls = trained(trainer)
    spec = home.spec("adapter", LORA_LR, model=model, reference={"kind": "adapter_off"})
    actual = ours(spec)

    assert_trls(actual, trls, exactly(spec))
    assert worst(trained_factors(spec), our_names(parameters(trainer.model))) < WEIGHTS_TOLERANCE
    assert beyond(ours(home.spec("adapter_copy", LORA_LR, model=model)), actual, 1e-6) == []

    bare = ours(home.spec("bare", LORA_LR, model=model, reference={"path": str(home.model)}))
    assert abs(bare[0]["loss"] - trls[0]["loss"]) > 0.01
