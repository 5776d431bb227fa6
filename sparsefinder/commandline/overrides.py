"""What people type after the command, put into the form that Hydra reads; what cannot be meant is one clear line.

Settings are typed as KEY=VALUE. Hydra reads values by a grammar of its own, in which a path with an equals sign, a letter
beyond ASCII or a bracket is an error that names neither the setting nor the cure. Here such values are quoted, a leading ``~``
becomes the home folder, and whatever cannot be meant is refused while it is still clear who typed what.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from sparsefinder.errors import UserError, meant, one_of
from sparsefinder.storage.store import ARTEFACTS

SWEEP = ("-m", "--multirun")
HELP = ("-h", "--help")
# what they take: nothing, one of these words, or any one word
OPTIONS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys((*SWEEP, *HELP, "--hydra-help", "--version", "--resolve"), ()),
    **dict.fromkeys(("-c", "--cfg"), ("job", "hydra", "all")),
    **dict.fromkeys(("-i", "--info"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
    **dict.fromkeys(("-p", "--package"), None),
}
QUESTIONS = (*HELP, "--hydra-help", "--version", "-c", "--cfg", "-i", "--info")
"""Options that are answered, and nothing is run."""
PATHS = (
    *("run_dir", "name", "model.name_or_path", "qk", "qk_validation", "projections", "centroids", "lowrank"),
    *("key_centroids", "bilinear_projections", "bilinear_centroids", "indexer", "calibration"),
    *("corpus.train", "corpus.validation", "corpus.test", "corpus.path", "corpus.name"),
)
"""Settings whose value is a name of somebody's, even where it looks like a number."""
_KEY = re.compile(r"(\+{0,2})([A-Za-z_][\w./@:-]*)", re.ASCII)
# of Hydra's grammar: characters that need no quotes, escaped ones, and interpolations
_PLAIN = re.compile(r"(?:[A-Za-z0-9_\-/:.+%*@?| ]|\\[\\()\[\]{}:=, \t]|\$\{[^{}]*\})*")
_FUNCTION = re.compile(r"(?:choice|range|interval|glob|sort|shuffle|tag|extend_list|int|float|bool|str|json_str)\(.*\)")
_NUMBER = re.compile(r"[+-]?(?:\.?\d[\w.+-]*|inf|nan)", re.IGNORECASE)
_ELSEWHERE = {  # of Hydra's own settings, those that are said otherwise here
    **dict.fromkeys(
        ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.output_subdir"),
        "everything of a run lies in one folder, run_dir=PATH",
    ),
    "hydra.job.chdir": "paths are read from the folder in which the command is started; use cd in the shell",
    "hydra.mode": "a sweep is started with -m",
}


@dataclass(frozen=True)
class Known:
    """What can be typed. ``groups``: folders of conf with the names of their files; ``settings``: all keys, found when needed."""

    groups: Mapping[str, Sequence[str]]
    settings: Callable[[], Sequence[str]]

    def key(self, word: str) -> bool:
        """Whether it is a setting."""
        return word in self.groups or word in self.settings()

    def advice(self, word: str) -> str:
        """What somebody who typed a bare word may have meant: the end of a message."""
        if word in [artefact.stage for artefact in ARTEFACTS.values()]:
            return f"; did you mean stage={word}?"
        if self.key(word):
            return f"; did you mean {word}=VALUE?"
        for key, names in self.groups.items():
            if word in names and word not in ("all", "none"):
                return f"; did you mean {key}={word}?"
        return meant([*self.groups, *self.settings()], word)


@dataclass(frozen=True)
class Typed:
    """A command line: ``options`` with their words, and ``settings`` as Hydra reads them."""

    options: tuple[str, ...]
    settings: tuple[str, ...]

    @property
    def sweeps(self) -> bool:
        """Whether it starts a run for each of the values of a setting."""
        return bool({*SWEEP} & {*self.options})

    @property
    def asks(self) -> bool:
        """Whether it is a question, to be answered without running anything."""
        return bool({*QUESTIONS} & {*self.options})


def understood(arguments: Sequence[str], known: Known) -> Typed:
    """The command line ``arguments``; a `UserError` for what is neither an option nor a setting."""
    waiting, options, settings = list(arguments), [], []
    while waiting:
        argument = waiting.pop(0)
        if argument.startswith("-"):
            options += _option(argument, waiting, known)
        elif argument.count("[") > argument.count("]") and any("]" in word for word in waiting):
            rest = waiting[: next(i for i, word in enumerate(waiting) if "]" in word) + 1]
            raise UserError(f"{argument!r} ends within a list: write it without blanks, {''.join([argument, *rest])}")
        else:
            settings.append(argument)
    if {"--resolve", "-p", "--package"} & {*options} and not {"-c", "--cfg", *HELP} & {*options}:
        raise UserError("--resolve and --package say how `--cfg job` prints: add --cfg job, or leave them out")
    sweeps = bool({*SWEEP} & {*options})
    readable = [override for setting in settings for override in _setting(setting, sweeps, known)]
    return Typed(tuple(options), tuple(_without_repeats(readable)))


def _option(argument: str, waiting: list[str], known: Known) -> list[str]:
    name, equals, value = argument.partition("=")
    if name not in OPTIONS:
        bare = name.lstrip("-")
        if bare and known.key(bare):
            given = value if equals else (waiting[0] if waiting and "=" not in waiting[0] else "VALUE")
            raise UserError(f"{name}: settings are written without dashes, as KEY=VALUE: {bare}={given}")
        raise UserError(
            f"there is no option {name}; settings are KEY=VALUE, options are "
            f"{one_of([option for option in OPTIONS if '--' in option], name, '')}"
        )
    words = OPTIONS[name]
    if words == ():
        if equals:
            raise UserError(f"{argument}: {name} takes no value")
        return [name]
    if not equals and name in ("-i", "--info") and not (waiting and waiting[0] in (words or ())):
        return [name]
    if not equals:
        if not waiting or "=" in waiting[0]:
            raise UserError(f"{name} needs a word after it: {name} {(words or ('PACKAGE',))[0]}")
        value = waiting.pop(0)
    if words is not None and value not in words:
        raise UserError(f"{name} {value} is unknown; {one_of(words, value)}")
    return [name, value]


def _setting(argument: str, sweeps: bool, known: Known) -> list[str]:
    """One argument as Hydra's overrides: one, or two for a model by its path."""
    left, equals, value = argument.partition("=")
    if left.startswith("~"):
        raise UserError(
            f"{argument!r}: a setting cannot be taken away: leave it out, or give another value as KEY=VALUE"
        )
    if not equals:
        advice = known.advice(left.strip())
        raise UserError(f"{argument!r} sets nothing: give settings as KEY=VALUE; `--help` lists them{advice}")
    match = _KEY.fullmatch(left.strip())
    if match is None:
        raise UserError(f"{argument!r} sets nothing: {left!r} is no name of a setting; `--help` lists them")
    plus, key = match.groups()
    if not value.strip():
        raise UserError(f"{key}= has no value: write {key}=VALUE, or leave it out")
    if value.strip().lower() == "null" and key in (*known.groups, "name", "stage"):
        valid = one_of(known.groups[key], "") if key in known.groups else f"give {key}=NAME, or leave it out"
        raise UserError(f"{key}={value}: one is needed; {valid}")
    if key in _ELSEWHERE:
        raise UserError(f"{key}={value}: {_ELSEWHERE[key]}")
    if key in known.groups and value.lstrip().startswith("["):
        raise UserError(_no_list(key, value))
    values = list(_parts(value, ","))
    if len(values) > 1 and not all(part.strip() for part in values):
        raise UserError(f"{argument}: nothing stands before or after a comma: give one value, or a list such as [a,b]")
    if len(values) > 1 and key == "stage":
        raise UserError(f"{argument}: nothing to sweep over; several stages are a list, stage=[score,evaluate]")
    if len(values) > 1 and not sweeps:
        other = "" if key in known.groups else f"; a list is {key}=[{value.strip()}]"
        other = f"; a path with a comma is quoted, {key}=\"'…'\"" if key in PATHS else other
        raise UserError(f"{argument}: several values are for sweeps: add --multirun, or -m{other}")
    if key == "model":
        return _model(argument, values, known)
    return [f"{plus}{key}={','.join(_readable(part, key in PATHS) for part in values)}"]


def _no_list(key: str, value: str) -> str:
    names = value.strip().strip("[]").replace(" ", "")
    if key == "pattern":
        return f"pattern={value} is a list: patterns={value} with pattern=all takes these, -m pattern={names} one after the other"
    return f"{key}={value} is a list: give one name, or sweep with -m {key}={names}"


def _model(argument: str, values: Sequence[str], known: Known) -> list[str]:
    """``model=PATH_OR_HUB_NAME`` for what is no file of conf/model: the pretrained model of that name."""
    are_files = [name.strip() in known.groups["model"] or name.strip().startswith("..") for name in values]
    if all(are_files):
        return [argument]
    if any(are_files):
        raise UserError(
            f"{argument}: sweep over files of conf/model, or over models by their path, not over both at once"
        )
    return ["model=pretrained", f"model.name_or_path={','.join(_readable(name, True, True) for name in values)}"]


def _without_repeats(settings: Sequence[str]) -> Iterator[str]:
    """What was typed twice the same stands once; two values of one setting are a `UserError`."""
    seen: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.lstrip("+").partition("=")
        if key not in seen:
            seen[key] = value
            yield setting
        elif seen[key] != value:
            raise UserError(f"{key} is set twice, to {seen[key]} and to {value}: leave one out")


# ---- values ----


def _readable(value: str, name: bool, always: bool = False) -> str:
    """A value as Hydra's grammar reads it; ``name``: numbers are names too; ``always``: quoted, whatever it is."""
    value = value.strip()
    if _is_quoted(value) or _FUNCTION.fullmatch(value):
        return value
    for opening, closing in ("[]", "{}"):
        if value.startswith(opening) and value.endswith(closing):
            inner = [_entry(part, name, opening) for part in _parts(value[1:-1], ",")]
            return f"{opening}{','.join(inner)}{closing}"
    home = os.path.expanduser(value) if value.startswith("~") else value
    needed = always or not _PLAIN.fullmatch(home) or (name and _NUMBER.fullmatch(home) is not None)
    return quoted(home) if needed else home


def _entry(text: str, name: bool, opening: str) -> str:
    if opening == "[" or ":" not in text:
        return _readable(text, name)
    key, _, value = text.partition(":")
    return f"{key.strip()}:{_readable(value, name)}"


def quoted(text: str) -> str:
    """In the quotes of Hydra's grammar: backslashes are doubled before a quote, and nowhere else."""
    return "'" + re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + ("\\'" if match[2] else ""), text) + "'"


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def _parts(text: str, separator: str) -> Iterator[str]:
    """``a,[b,c],'d,e'`` → ``a``, ``[b,c]``, ``'d,e'``: what stands between separators that are in no bracket and no quotes."""
    if not _closes(text):  # an odd bracket or quote is a letter like any other
        yield text
        return
    depth, quote, start = 0, "", 0
    for i, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[i - 1] != "\\" else quote
        elif letter in "'\"":
            quote = letter
        elif letter == separator and not depth and text[i - 1 : i] != "\\":
            yield text[start:i]
            start = i + 1
        else:
            depth += (letter in "[({") - (letter in "])}")
    yield text[start:]


def _closes(text: str) -> bool:
    bare = re.sub(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", "", text)
    return not re.search(r"['\"]", bare) and all(bare.count(a) == bare.count(b) for a, b in ("[]", "()", "{}"))
