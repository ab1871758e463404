"""Show training rows as the model sees them, and the lengths of all rows (`plan --show-rows`)."""

import re
from collections.abc import Iterator
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orchestrator.data.collate import fed_sequences
from orchestrator.data.order import Integers, longest_sequences
from orchestrator.data.pair_cache import tokenized_pairs
from orchestrator.data.pairs import Pairs
from orchestrator.data.repeats import repeat_counts, repeat_lines
from orchestrator.data.row import BadRow, printable
from orchestrator.data.shapes import note_lines
from orchestrator.data.sources import Place, first_rows
from orchestrator.data.tokens import tokenize_pair, truncated
from orchestrator.models.policy import load_tokenizer
from orchestrator.settings.data import DataSpec
from orchestrator.settings.run import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILES = {"min": 0.0, "50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}
BINS = 20
BARS = "▁▂▃▄▅▆▇█"
LEGEND = (
    "⟦ ⟧ enclose the scored tokens, in packed and in padded rows; ⏎ is a line break, ␣ a "
    "trailing space, ⟨ ⟩ the number and text of tokens cut by truncation"
)
CUT_TEXT = 60  # maximum characters shown of truncated text


def as_json(spec: RunSpec, count: int) -> dict[str, Any]:
    """Return the first `count` training rows and the lengths of every set, as JSON types.

    Raises:
        UserError: the data or the tokenizer are wrong.
    """
    tokenizer = _quiet_tokenizer(spec)
    shown = [json_row(row) for row in shown_rows(spec.data, tokenizer, count)]
    train, held_out = _pairs_of_sets(spec, tokenizer)
    sets = dict(_lengths_of_sets([train, *held_out.values()], spec.data))
    return {"rows": shown, "lengths": sets, "repeats": repeat_counts(train, held_out)}


def as_lines(spec: RunSpec, count: int, colour: bool) -> Iterator[str]:
    """Yield the same facts as lines for a terminal, as soon as they are known."""
    tokenizer = _quiet_tokenizer(spec)
    yield LEGEND
    if spec.data.collator:
        yield f"data.collator {spec.data.collator.path} may lay them out differently"
    for shown in shown_rows(spec.data, tokenizer, count):
        yield ""
        yield from row_lines(shown, tokenizer, colour)
    train, held_out = _pairs_of_sets(spec, tokenizer)
    for key, statistics in _lengths_of_sets([train, *held_out.values()], spec.data):
        yield ""
        yield from length_lines(key, statistics, spec.data)
    for line in repeat_lines(train, held_out):
        yield ""
        yield line


def _quiet_tokenizer(spec: RunSpec) -> "PreTrainedTokenizerBase":
    from transformers import logging

    logging.set_verbosity_error()
    return load_tokenizer(spec)


def _pairs_of_sets(
    spec: RunSpec, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Pairs, dict[str, Pairs]]:
    """Return the training pairs, and the evaluation pairs by the name of their set.

    A set that is not in the cache yet is added to it, and the run reads it from there.
    """
    data, cache = spec.data, spec.cache_dir
    held_out = {name: tokenized_pairs(data, "eval", tokenizer, cache, name) for name in data.eval}
    return tokenized_pairs(data, "train", tokenizer, cache), held_out


def _lengths_of_sets(sets: list[Pairs], data: DataSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (setting, lengths and counts) of every source."""
    for pairs in sets:
        for each in pairs.sets:
            counts = {"unread_columns": each.unread_columns, "notes": each.notes}
            yield each.key, lengths(each.uncut_lengths, data, each.dropped, each.unread) | counts


class Part(NamedTuple):
    """Consecutive tokens, and their text within the sequence."""

    ids: list[int]
    text: str


class ShownSide(NamedTuple):
    """One of a pair's two sequences after truncation, and the parts cut from its ends."""

    cut_before: Part
    prompt: Part
    completion: Part
    cut_after: Part
    scored: int  # scored tokens of the completion: all, except a first one at position 0


class ShownRow(NamedTuple):
    """A row as it is trained on, or the reason why it is dropped."""

    place: Place
    dropped: str | None  # why it is dropped; then it has no sides
    left_out: str  # end of the prompt tokenised alone, if it ends differently in the sequences
    chosen: ShownSide | None
    rejected: ShownSide | None


def shown_rows(
    data: DataSpec, tokenizer: "PreTrainedTokenizerBase", count: int
) -> Iterator[ShownRow]:
    """Yield the first training rows, processed by the functions that create the batches of a run.

    Raises:
        UserError: the source cannot be read, or the chat template does not fit the settings.
    """
    for place, row in first_rows(data, count):
        try:
            uncut, left_out = tokenize_pair(row, tokenizer, data)
            cut = truncated(uncut, data)
        except BadRow as bad:
            yield ShownRow(place, f"{bad.kind}: {bad.reason}", "", None, None)
            continue
        fed = fed_sequences(cut._asdict(), data.keep_last)
        before = (uncut.chosen_ids, uncut.rejected_ids)
        after = (cut.chosen_ids, cut.rejected_ids)
        sides = []
        for completion, kept, sequence in zip(before, after, fed, strict=True):
            ids, prompt = uncut.prompt_ids + completion, len(uncut.prompt_ids)
            stop = prompt + len(kept)
            start = stop - len(sequence.ids)
            pieces = ids[:start], ids[start:prompt], ids[max(start, prompt) : stop], ids[stop:]
            sides.append(ShownSide(*_parts(tokenizer, pieces), scored=len(sequence.labels)))
        yield ShownRow(place, None, _decoded(tokenizer, left_out), *sides)


def json_row(shown: ShownRow) -> dict[str, Any]:
    """Return a row as JSON types: {prompt: {ids, text}, ...} for each side."""
    row = {**shown.place._asdict(), **shown._asdict()}
    del row["place"]
    for side in ("chosen", "rejected"):
        if (of := row[side]) is not None:
            parts = of._asdict().items()
            row[side] = {
                name: part._asdict() if isinstance(part, Part) else part for name, part in parts
            }
    return row


def _parts(tokenizer: "PreTrainedTokenizerBase", pieces: tuple[list[int], ...]) -> Iterator[Part]:
    """Yield the parts of a sequence, decoded together: alone, one may lose its first space."""
    ids: list[int] = []
    before = ""
    for piece in pieces:
        ids = ids + piece
        so_far = _decoded(tokenizer, ids)
        text = so_far[len(before) :] if so_far.startswith(before) else _decoded(tokenizer, piece)
        yield Part(piece, text if piece else "")
        before = so_far


def _decoded(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def lengths(
    uncut: Integers, data: DataSpec, dropped: dict[str, int], unread: dict[str, int]
) -> dict[str, Any]:
    """Return statistics of lengths and truncation, by name, as JSON types.

    uncut: [M, 3] tokens of prompt, chosen and rejected before truncation. dropped: rows by reason.
    unread: rows by variable that their chat template does not read.
    """
    parts: dict[str, Integers] = dict(zip(("prompt", "chosen", "rejected"), uncut.T, strict=True))
    parts["longer_sequence"] = longest_sequences(uncut)
    beyond = int(parts["longer_sequence"].max()) + 1
    width = -(-beyond // BINS)
    edges = np.arange(0, beyond + width, width)
    prompt = np.minimum(uncut[:, 0], data.max_prompt_length or uncut.max())
    completions = np.minimum(uncut[:, 1:], data.max_completion_length or uncut.max())
    limit = data.max_length or np.inf
    fills = (prompt >= limit) & (data.truncation == "keep_start")
    return {
        "rows": len(uncut),
        "tokens": {
            name: {key: int(np.quantile(of, q, method="higher")) for key, q in QUANTILES.items()}
            for name, of in parts.items()
        },
        "histogram_edges": edges.tolist(),
        "histogram": {name: np.histogram(of, edges)[0].tolist() for name, of in parts.items()},
        "cut": {
            "max_prompt_length": int((prompt < uncut[:, 0]).sum()),
            "max_completion_length": int((completions < uncut[:, 1:]).any(axis=1).sum()),
            "max_length": int(((prompt + completions.max(axis=1) > limit) & ~fills).sum()),
        },
        "dropped": dropped,
        "unread": unread,
    }


def row_lines(shown: ShownRow, tokenizer: "PreTrainedTokenizerBase", colour: bool) -> Iterator[str]:
    """Yield a row as lines for a terminal. colour: add ANSI colours, and special tokens in bold."""
    name = f"row {shown.place.row} of {shown.place.source}"
    if shown.chosen is None or shown.rejected is None:
        yield f"{name}: dropped, {shown.dropped}"
        return
    sides = {"chosen": shown.chosen, "rejected": shown.rejected}
    counts = ", ".join(
        f"{side} {len(of.prompt.ids)} + {len(of.completion.ids)}" for side, of in sides.items()
    )
    yield f"{name}: tokens of prompt + completion: {counts}"
    if shown.left_out:
        differs = "followed by a completion it does not, so the completion starts earlier"
        yield f"  tokenised alone the prompt ends with {shown.left_out!r}; {differs}"
    paint = _Paint(tokenizer, colour)
    prompts = [
        paint.cut(of.cut_before, at_end=False) + paint(of.prompt, "") for of in sides.values()
    ]
    one, other = ((of.cut_before, of.prompt) for of in sides.values())
    is_shared = one == other
    if is_shared:
        yield from _block("prompt", prompts[0])
    for (side, of), prompt, code in zip(sides.items(), prompts, ("32", "31"), strict=True):
        before = "" if is_shared else prompt
        completion = paint(of.completion, code).removesuffix("\n")
        yield from _block(side, f"{before}⟦{completion}⟧{paint.cut(of.cut_after, at_end=True)}")
        if of.scored < len(of.completion.ids):
            yield "            its first token has no predecessor and is not scored"
        if tokenizer.eos_token_id not in of.completion.ids:
            yield f"            it has no end token ({tokenizer.eos_token})"


class _Paint:
    """Formatter that makes the text of tokens visible, and colours it if colours are on."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", colour: bool) -> None:
        self.colour = colour
        self._special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)) or "(?!)")

    def __call__(self, part: Part, code: str) -> str:
        text = _visible(part.text)
        if not self.colour:
            return text
        text = self._special.sub(lambda token: f"\x1b[1m{token[0]}\x1b[22m", text)
        if not code:
            return text
        return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))

    def cut(self, part: Part, at_end: bool) -> str:
        """Return a mark for cut tokens: their number, and the text next to the kept part."""
        if not part.ids:
            return ""
        text = _visible(part.text).replace("\n", "")
        if len(text) > CUT_TEXT:
            text = f"{text[:CUT_TEXT]}..." if at_end else f"...{text[-CUT_TEXT:]}"
        text = f"⟨cut {len(part.ids)}: {text}⟩"
        return f"\x1b[2m{text}\x1b[0m" if self.colour else text


def _visible(text: str) -> str:
    """Return text with symbols for line breaks, spaces at line ends and control characters."""
    text = printable(text, keep="\n")
    text = re.sub(r" +(?=\n|\Z)", lambda blanks: "␣" * len(blanks[0]), text)
    return text.replace("\n", "⏎\n")


def _block(name: str, text: str) -> Iterator[str]:
    """Yield lines of text beside the name of the block."""
    labels = chain([name], repeat(""))
    for label, line in zip(labels, text.removesuffix("\n").split("\n"), strict=False):
        yield f"  {label:<10}{line}"


def length_lines(key: str, statistics: dict[str, Any], data: DataSpec) -> Iterator[str]:
    """Yield the result of `lengths` for the data set of a setting, as lines for a terminal."""
    names = {name: name.replace("_", " ") for name in statistics["tokens"]}
    width = max(map(len, names.values()))
    last = statistics["histogram_edges"][-1] - 1
    yield f"{key}: tokens of {statistics['rows']} rows before truncation"
    yield f"{'':<{width}}  " + "".join(f"{name:>7}" for name in QUANTILES) + f"   0 to {last}"
    for name, label in names.items():
        numbers = "".join(f"{statistics['tokens'][name][quantile]:>7}" for quantile in QUANTILES)
        yield f"{label:<{width}}  {numbers}   {_bars(statistics['histogram'][name])}".rstrip()
    for limit, rows in statistics["cut"].items():
        if (value := getattr(data, limit)) is not None:
            how = f" ({data.truncation})" if limit == "max_length" else ""
            yield f"rows cut by data.{limit}={value}{how}: {rows}"
    for reason, rows in statistics["dropped"].items():
        yield f"rows dropped, {reason}: {rows}"
    for variable, rows in statistics["unread"].items():
        yield f"rows with {variable}, which the chat template does not read: {rows}"
    yield from note_lines(statistics.get("unread_columns", {}), statistics.get("notes", {}))


def _bars(counts: list[int]) -> str:
    """Return one symbol per bin; a bin with any row is visible."""
    most = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] if count else " " for count in counts)
