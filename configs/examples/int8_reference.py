"""Use an 8-bit reference model: any model that from_pretrained loads can be the reference."""

import sys
import tempfile

from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orchestrator import debug, load_spec, train


def in_8_bits(policy):
    # a model of the hub is loaded by its name; this policy was just created and is in no folder
    with tempfile.TemporaryDirectory() as folder:
        policy.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


run = debug if "--debug" in sys.argv else train
overrides = [word for word in sys.argv if "=" in word]
spec = load_spec("configs/examples/base.yaml", ["run.name=int8-reference-python", *overrides])
run(spec, ref_model=in_8_bits)
