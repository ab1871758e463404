"""What each forked run would make anew, made once for all by the process that they are forks of."""

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

get_checkpoint_conversion_mapping("qwen2")  # whoever saves a model compiles 900 regular expressions
