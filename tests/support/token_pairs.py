"""Two pairs of token ids whose batches can be checked by hand."""

EXAMPLE = [
    {"pair_id": 11, "prompt_ids": [1, 2, 3], "chosen_ids": [4, 5], "rejected_ids": [6]},
    {"pair_id": 12, "prompt_ids": [7, 8], "chosen_ids": [9], "rejected_ids": [10, 11]},
]
