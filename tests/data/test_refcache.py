"""An answer of the reference is found by exactly the same question and believed only when it is
whole.
"""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.data import refcache as module
from orchestrator.data.collate import PreferenceCollator
from orchestrator.data.loader import Loader, StepBatches
from orchestrator.data.order import Order
from orchestrator.data.pair_cache import content_hash, tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.data.refcache import RECORD, RefCache, cache_folder
from orchestrator.models.identity import identity_of
from support.thread_ranks import on_ranks
from support.tiny_parts import PAD, data_spec, tiny_model, tokenizer
from support.tiny_settings import random_rows, write_jsonl

COUNT = 11
ALL = np.arange(COUNT)


def made_pairs(folder: Path, rows: list[dict[str, Any]]) -> Pairs:
    data = data_spec(train=str(write_jsonl(folder / "train.jsonl", rows)))
    return tokenized_pairs(data, "train", tokenizer(), folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return made_pairs(tmp_path_factory.mktemp("pairs"), random_rows(COUNT))


def cache(
    folder: Path, pairs: Pairs, split: Any = "train", keep_last: int | None = None
) -> RefCache:
    folder.mkdir(exist_ok=True)
    return RefCache(folder, pairs, split, keep_last)


def answers(pairs: Pairs, indices: Any = ALL) -> torch.Tensor:
    """[2b] what a made-up reference says, all chosen first; different for every pair and side."""
    numbers = torch.from_numpy(pairs.pair_ids[indices]).double()
    return torch.cat([-numbers - 0.1, -numbers / 3])


def add(cache: RefCache, pairs: Pairs, indices: Any) -> None:
    cache.add(torch.from_numpy(pairs.pair_ids[indices]), answers(pairs, indices))


def rehash(pairs: Pairs, index: int) -> None:
    """As tokenising them would have."""
    pairs.hashes = np.array(pairs.hashes)
    pairs.hashes[index] = np.frombuffer(
        content_hash(pairs.lengths[index], pairs.tokens(index)), "<u8"
    )


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.logps"))


def known(cache: RefCache) -> list[int]:
    return np.setdiff1d(ALL, cache.unknown()).tolist()


# --- round trip -----------------------------------------------------------------------------------


def test_log_probs_are_read_back_bitwise_in_any_order(tmp_path: Path, pairs: Pairs) -> None:
    first = cache(tmp_path, pairs)
    add(first, pairs, np.array([7, 2, 5]))
    add(first, pairs, np.array([0]))
    for actual in (first, cache(tmp_path, pairs)):
        assert known(actual) == [0, 2, 5, 7]
        options = np.array([5, 0, 7])
        value = actual.known(options)
        assert value is not None
        assert torch.equal(value, answers(pairs, options))


def test_cached_log_probs_are_returned_for_all_rows_or_none(tmp_path: Path, pairs: Pairs) -> None:
    ref_cache = cache(tmp_path, pairs)
    assert ref_cache.known(np.array([0])) is None
    assert ref_cache.unknown().tolist() == ALL.tolist()
    add(ref_cache, pairs, np.array([0, 1]))
    assert ref_cache.known(np.array([0, 1])) is not None
    assert ref_cache.known(np.array([0, 1, 2])) is None


@pytest.mark.parametrize("side", [0, 1])
def test_a_log_prob_that_is_not_finite_is_never_cached(
    tmp_path: Path, pairs: Pairs, side: int
) -> None:
    ref_cache, answer = cache(tmp_path, pairs), torch.tensor([-2.0, -1.0], dtype=torch.float64)
    answer[side] = torch.nan
    ref_cache.add(torch.tensor([int(pairs.pair_ids[3])]), answer)
    for each in (ref_cache, cache(tmp_path, pairs)):
        assert each.known(np.array([3])) is None
        assert 3 in each.unknown()


def test_log_probs_of_another_process_are_read_at_the_next_step(
    tmp_path: Path, pairs: Pairs
) -> None:
    ours, theirs = cache(tmp_path, pairs), cache(tmp_path, pairs)
    add(ours, pairs, np.array([1]))
    add(theirs, pairs, np.array([2, 3]))
    assert len(files(tmp_path)) == 2  # nobody appends to another's file
    assert known(ours) == [1]
    ours.read()
    assert known(ours) == [1, 2, 3]


# --- damage ---------------------------------------------------------------------------------------


def test_a_torn_record_is_lost_and_the_others_are_not(tmp_path: Path, pairs: Pairs) -> None:
    add(cache(tmp_path, pairs), pairs, np.array([4, 5, 6]))
    [path] = files(tmp_path)
    whole = path.read_bytes()
    assert len(whole) == 3 * RECORD.itemsize
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        ref_cache = cache(tmp_path, pairs)
        assert known(ref_cache) == [4, 5, 6][: length // RECORD.itemsize]
    path.write_bytes(whole[:-1])
    again = cache(tmp_path, pairs)
    add(again, pairs, np.array([6]))
    assert known(cache(tmp_path, pairs)) == [4, 5, 6]


def test_a_record_with_a_flipped_bit_is_ignored(tmp_path: Path, pairs: Pairs) -> None:
    add(cache(tmp_path, pairs), pairs, np.array([4, 5]))
    [path] = files(tmp_path)
    whole = bytearray(path.read_bytes())
    for place in range(RECORD.itemsize):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            ref_cache = cache(tmp_path, pairs)
            assert known(ref_cache) == [5], (place, bit)


@pytest.mark.parametrize("content", [b"", b"\0" * 400, b"\xff" * 400, b"nonsense" * 77])
def test_a_file_of_random_bytes_is_ignored(tmp_path: Path, pairs: Pairs, content: bytes) -> None:
    (tmp_path / "0.logps").write_bytes(content)
    assert known(cache(tmp_path, pairs)) == []


# --- what makes a question ------------------------------------------------------------------------


def test_rows_with_equal_tokens_have_their_own_log_probs(tmp_path: Path) -> None:
    twins = made_pairs(tmp_path, [*random_rows(3), *random_rows(3)])
    reopened = cache(tmp_path / "cache", twins)
    add(reopened, twins, np.array([1]))
    for each in (reopened, cache(tmp_path / "cache", twins)):
        assert each.known(np.array([1])) is not None
        assert each.known(np.array([4])) is None
    add(reopened, twins, np.array([4]))
    ref_cache = cache(tmp_path / "cache", twins).known(np.array([1, 4]))
    assert ref_cache is not None
    assert torch.equal(ref_cache, answers(twins, np.array([1, 4])))


def test_cache_keys_do_not_depend_on_row_numbers_or_order(tmp_path: Path, pairs: Pairs) -> None:
    add(cache(tmp_path / "cache", pairs), pairs, ALL)
    other = made_pairs(tmp_path, [*random_rows(2, seed=9), *random_rows(COUNT)[::-1]])
    ref_cache = cache(tmp_path / "cache", other)
    assert ref_cache.unknown().tolist() == [0, 1]
    value = ref_cache.known(np.arange(COUNT + 1, 1, -1))
    assert value is not None
    assert torch.equal(value, answers(pairs))


def _keep_last(folder: Path, pairs: Pairs) -> RefCache:
    return cache(folder, pairs, keep_last=5)


def _other_keep_last(folder: Path, pairs: Pairs) -> RefCache:
    return cache(folder, pairs, keep_last=6)


def _evaluation(folder: Path, pairs: Pairs) -> RefCache:
    return cache(folder, pairs, "eval")


def test_cache_keys_cover_truncation_and_split(tmp_path: Path, pairs: Pairs) -> None:
    kinds: list[Callable[[Path, Pairs], RefCache]] = [
        cache,
        _keep_last,
        _other_keep_last,
        _evaluation,
    ]
    for number, kind in enumerate(kinds):
        folder = tmp_path / str(number)
        add(kind(folder, pairs), pairs, ALL)
        assert [known(other(folder, pairs)) != [] for other in kinds] == [
            other is kind for other in kinds
        ]


def test_cache_keys_cover_every_token_and_the_start_of_completions(
    tmp_path: Path, pairs: Pairs
) -> None:
    add(cache(tmp_path, pairs), pairs, ALL)
    total = int(pairs.lengths[3].sum())
    start = int(pairs.lengths[:3].sum())
    changed = Pairs.__new__(Pairs)
    for place in range(total):
        vars(changed).update(vars(pairs), _tokens=[np.array(pairs._tokens[0])])
        changed._tokens[0][start + place] += 1
        rehash(changed, 3)
        assert cache(tmp_path, changed).unknown().tolist() == [3]
    for move in ([1, -1, 0], [0, 1, -1], [-1, 0, 1]):
        vars(changed).update(vars(pairs), lengths=pairs.lengths.copy())
        changed.lengths[3] += move
        rehash(changed, 3)
        assert cache(tmp_path, changed).unknown().tolist() == [3]


def test_each_identity_has_a_folder_of_its_own(tmp_path: Path) -> None:
    base: dict[str, Any] = {
        "reference": {"weights": "a", "config": {"x": 1}},
        "precision": "fp32",
        "attention": "cpu",
    }
    changes: list[dict[str, Any]] = [
        {},
        {"reference": {"weights": "b", "config": {"x": 1}}},
        {"reference": {"weights": "a", "config": {"x": 2}}},
        {"precision": "bf16"},
        {"attention": "padded"},
        {"device": "cuda"},
    ]
    folders = [cache_folder(tmp_path, base | change) for change in changes]
    assert len(set(folders)) == len(changes)
    assert cache_folder(tmp_path, dict(reversed(base.items()))) == folders[0]
    assert json.loads((folders[3] / "meta.json").read_text())["precision"] == "bf16"
    assert [path.name for path in folders[0].iterdir()] == ["meta.json"]


def test_the_format_is_part_of_the_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cache_folder(tmp_path, {})
    monkeypatch.setattr("orchestrator.data.refcache.FORMAT", 2)
    assert cache_folder(tmp_path, {}) != before


# --- the reference's identity ---------------------------------------------------------------------


def identity(model: Any, ranks: int = 1) -> dict[str, Any]:
    by_rank = on_ranks(ranks, lambda world: identity_of(model.state_dict(), model.config, world))
    assert all(each == by_rank[0] for each in by_rank)
    return by_rank[0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_identity_does_not_depend_on_the_ranks(ranks: int) -> None:
    assert identity(tiny_model(), ranks) == identity(tiny_model())
    json.dumps(identity(tiny_model()))


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_identity_changes_with_any_weight(ranks: int) -> None:
    model = tiny_model()
    before = identity(model)["weights"]
    for name, tensor in model.state_dict().items():
        last = tensor.view(-1)[-1:]
        kept = last.clone()
        last.copy_(torch.nextafter(kept, torch.tensor([9.0])))
        assert identity(model, ranks)["weights"] != before, name
        last.copy_(kept)
    assert identity(model, ranks)["weights"] == before


def test_the_identity_changes_with_two_weights_exchanged() -> None:
    model = tiny_model(tie_word_embeddings=False)
    before = identity(model)["weights"]
    first, second = (layer.mlp.up_proj.weight.data for layer in model.model.layers)
    kept = first.clone()
    first.copy_(second)
    second.copy_(kept)
    assert identity(model)["weights"] != before


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": 1e-5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}],
    ids=str,
)
def test_the_identity_depends_on_the_config_but_not_on_its_path(
    change: dict[str, Any],
) -> None:
    base, other = tiny_model(), tiny_model(**change)
    assert identity(base)["weights"] == identity(other)["weights"]
    assert identity(base) != identity(other)
    moved = tiny_model()
    moved.config._name_or_path = "/elsewhere"
    assert identity(moved) == identity(base)


def test_the_identity_changes_with_the_type_of_the_weights() -> None:
    assert identity(tiny_model().bfloat16()) != identity(tiny_model().bfloat16().float())


# --- in the loader --------------------------------------------------------------------------------


def loader(
    pairs: Pairs, folder: Path, global_batch: int = 4, rank: int = 0, ranks: int = 1
) -> Loader:
    order = Order(pairs.lengths, global_batch, rank, ranks, 7, 2)
    step_loader = Loader(pairs, order, PreferenceCollator(PAD, data_spec()))
    step_loader.cache = cache(folder, pairs)
    return step_loader


def remember(loader: Loader, pairs: Pairs, step: StepBatches) -> None:
    for batch, indices in zip(step.micro_batches, step.indices, strict=True):
        loader.remember(batch, answers(pairs, indices))


# with one step an epoch, the next is made before this is due
@pytest.mark.parametrize("global_batch", [4, COUNT])
def test_the_second_epoch_has_all_log_probs(
    tmp_path: Path, pairs: Pairs, global_batch: int
) -> None:
    ours = loader(pairs, tmp_path, global_batch)
    per_epoch = -(-COUNT // global_batch)
    steps = ours.steps(0, 0)
    for number, step in enumerate(islice(steps, 3 * per_epoch)):
        for batch, indices in zip(step.micro_batches, step.indices, strict=True):
            if number < per_epoch:
                assert batch.ref_logps is None
            else:
                assert batch.ref_logps is not None
                assert torch.equal(batch.ref_logps, answers(pairs, indices))
        remember(ours, pairs, step)
    steps.close()
    # each once
    assert [path.stat().st_size for path in files(tmp_path)] == [COUNT * RECORD.itemsize]


def test_the_second_epoch_has_log_probs_of_other_ranks(tmp_path: Path, pairs: Pairs) -> None:
    ranks = [loader(pairs, tmp_path, rank=rank, ranks=2) for rank in range(2)]
    steps = [each.steps(0, 0) for each in ranks]
    for number in range(2 * -(-COUNT // 4)):
        for each, mine in zip(ranks, steps, strict=True):
            step_batches = next(mine)
            real = [batch for batch in step_batches.micro_batches if batch.pair_weights.any()]
            assert all(
                (batch.ref_logps is not None) == (number >= -(-COUNT // 4)) for batch in real
            )
            remember(each, pairs, step_batches)
    for mine in steps:
        mine.close()


def test_a_filler_is_not_remembered(tmp_path: Path, pairs: Pairs) -> None:
    last = loader(pairs, tmp_path, global_batch=2, rank=2, ranks=3)
    step_batches = next(steps := last.steps(0, 0))
    steps.close()
    assert [float(batch.pair_weights.sum()) for batch in step_batches.micro_batches] == [0]
    remember(last, pairs, step_batches)
    assert files(tmp_path) == []
    assert last.cache is not None
    assert len(last.cache.unknown()) == COUNT


def test_evaluation_log_probs_are_computed_once(tmp_path: Path, pairs: Pairs) -> None:
    ours = loader(pairs, tmp_path)
    for is_first in (True, False):
        micro_batches, make = ours.whole(0)
        for micro in micro_batches:
            batch = make(micro)
            assert (batch.ref_logps is None) == is_first
            ours.remember(batch, answers(pairs, micro.pairs))


def test_without_a_cache_nothing_is_known_or_kept(tmp_path: Path, pairs: Pairs) -> None:
    ours = loader(pairs, tmp_path)
    ours.cache = None
    steps = ours.steps(0, 0)
    for step in islice(steps, 5):
        assert all(batch.ref_logps is None for batch in step.micro_batches)
        remember(ours, pairs, step)
    steps.close()
    assert files(tmp_path) == []


def test_a_disk_that_takes_no_more_does_not_end_the_run(
    tmp_path: Path, pairs: Pairs, caplog: pytest.LogCaptureFixture
) -> None:
    ref_cache = cache(tmp_path, pairs)
    tmp_path.joinpath("gone").mkdir()
    ref_cache._own = tmp_path / "gone"  # a folder: it cannot be opened for writing
    add(ref_cache, pairs, np.array([1]))
    add(ref_cache, pairs, np.array([2]))
    assert known(ref_cache) == [1, 2]
    assert len(caplog.records) == 1
    assert "reference.cache continues without it" in caplog.text
    assert known(cache(tmp_path, pairs)) == []


def test_the_first_cached_log_prob_is_kept(tmp_path: Path, pairs: Pairs) -> None:
    first, second = cache(tmp_path, pairs), cache(tmp_path, pairs)
    second.add(torch.from_numpy(pairs.pair_ids[[0]]), torch.tensor([-7.0, -8.0]))
    add(first, pairs, np.array([0]))
    for actual in (first, cache(tmp_path, pairs)):
        assert torch.equal(actual.known(np.array([0])), answers(pairs, np.array([0])))


def test_reading_again_reads_only_what_is_new(
    tmp_path: Path, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = cache(tmp_path, pairs), cache(tmp_path, pairs)
    add(writer, pairs, np.array([0, 1, 2]))
    reader.read()
    add(writer, pairs, np.array([3]))
    seen: list[int] = []
    whole = module._whole_records

    def counted(path: Path, start: int) -> Any:
        records, end = whole(path, start)
        seen.append(len(records))
        return records, end

    monkeypatch.setattr(module, "_whole_records", counted)
    reader.read()
    assert seen == [1]
    assert known(reader) == [0, 1, 2, 3]
