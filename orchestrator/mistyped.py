"""Return errors for unknown words of the command line, with what to type instead."""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrator.settings.catalogue import by_last_name, settings
from orchestrator.settings.errors import UserError
from orchestrator.settings.explain import meant_by
from orchestrator.settings.near import folded, nearest
from orchestrator.settings.other_names import OTHER_NAMES
from orchestrator.settings.trl_names import TRL_NAMES
from orchestrator.settings.wrong_file import folder_error, is_data, missing_file, yaml_files

FOR_EXAMPLE = "for example orchestrator train my.yaml optimizer.lr=1e-6"
Verbs = Mapping[str, argparse.ArgumentParser]


def is_file(word: str) -> bool:
    """Return whether a word is a settings file, existing or not, or a run directory."""
    return (
        word.endswith((".yaml", ".yml"))
        or os.path.isfile(word)
        or os.path.isfile(f"{word}/config.yaml")
    )


def wrong_verb(word: str, verbs: Verbs) -> UserError:
    """Return the error for a first word that is not a verb."""
    near = nearest(word, [*verbs, "help"])
    fix = f"did you mean {near}?" if near else "see orchestrator help"
    if is_file(word) or "=" in word:
        fix = f"write orchestrator train {word}"
    return UserError("VERB", word, f"is not one of {', '.join(verbs)}", fix)


def wrong_help(word: str, verbs: Verbs) -> UserError:
    """Return the error for a word without a help page."""
    near = nearest(word, [*verbs, *settings()])
    fix = f"did you mean {near}?" if near else meant_by((word.rpartition(".")[2],))
    return UserError("help", word, "is neither a verb nor a setting", fix)


def wrong_word(before: str, word: str, following: Sequence[str]) -> UserError:
    """Return the error for a word that is neither a file nor key=value.

    before, following: the words around it.
    """
    key = word.partition("=")[0]
    if following and following[0].startswith("="):  # key = value, key =value
        typed = following[: 1 if following[0] != "=" else 2]
        fix = f"write {word}{''.join(typed)}"
        return UserError("override", " ".join([word, *typed]), "has spaces around =", fix)
    if not key:
        return UserError(
            "override", word, "is not of the form key=value", "for example optimizer.lr=1e-6"
        )
    if before.endswith("="):  # key= value
        fix = f"write {before}{word}"
        return UserError("override", f"{before} {word}", "has a space after =", fix)
    if os.path.isdir(word):
        return folder_error(word)
    if is_data(Path(word)):
        return missing_file(Path(word))
    rule = "is neither a YAML file nor of the form key=value"
    if word in settings() and not os.path.exists(f"{word}.yaml"):
        return UserError("override", word, rule, f"for example {word}=VALUE")
    files = yaml_files(word)
    near = f"{word}.yaml" if f"{word}.yaml" in files else nearest(word, files)
    return UserError("FILE", word, rule, f"did you mean {near}?" if near else FOR_EXAMPLE)


def wrong_flag(words: Sequence[str], flag: str, verbs: Verbs) -> UserError:
    """Return the error for a flag that the verb does not have: often it is a setting."""
    verb = next((word for word in words if word in verbs), "orchestrator")
    name, has_value, value = flag.partition("=")
    if verb in verbs and name in flags_of(verbs[verb]):
        rule = "is a flag, which must follow its verb"
        return UserError("VERB", flag, rule, f"write orchestrator {verb} {flag}")
    if not has_value and flag in words:
        following = [*words[words.index(flag) + 1 :], ""][0]
        is_value = "=" not in following and not following.startswith("-")
        value = following if is_value and not is_file(following) else ""
    fix = _meant_by_flag(name, value or "VALUE", verb, verbs)
    return UserError(name, value or None, f"is not a flag of {verb}", fix)


def _meant_by_flag(name: str, value: str, verb: str, verbs: Verbs) -> str:
    """Return what was probably meant by a wrong flag: another flag, a setting or another verb."""
    if verb in verbs and (near := nearest(name, flags_of(verbs[verb]), cutoff=0.75)):
        return f"did you mean {near}?"
    bare = folded(name.lstrip("-"))
    owners = [other for other in verbs if name in flags_of(verbs[other])]
    also = f"; {name} is a flag of {' and '.join(owners)}" if owners else ""
    homes = by_last_name().get(bare, [])
    candidates = [bare, TRL_NAMES.get(bare), OTHER_NAMES.get(bare)]
    if len(homes) == 1:
        candidates += homes
    if setting := next((each for each in candidates if each in settings()), None):
        return f"write {setting}={value}: settings have no dashes{also}"
    if answer := TRL_NAMES.get(bare) or OTHER_NAMES.get(bare):
        return f"did you mean {answer}?"
    if owners:
        return also.removeprefix("; ")
    return f"settings have no dashes, {FOR_EXAMPLE}; flags: orchestrator help {verb}"


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the flags of a verb."""
    return list(parser._option_string_actions)  # argparse has no public API for it
