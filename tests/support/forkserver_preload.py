"""Compute once, in the process that ranks are forks of, what each of them would compute anew."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen2")  # whoever saves a model compiles 900 regular expressions
