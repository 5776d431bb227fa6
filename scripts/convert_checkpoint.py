"""Convert a checkpoint for long inputs: to LSG attention (the default), Longformer, Nyströmformer, BigBird or LED.

    python scripts/convert_checkpoint.py --initial_model roberta-base --model_name lsg-roberta-base --max_sequence_length 4096
    python scripts/convert_checkpoint.py --target longformer --initial_model roberta-base --model_name longformer-base \
        --model_kwargs "{'attention_window': 256}"

For LSG these are the arguments of the published converter (ccdv-ai/convert_checkpoint_to_lsg). As there, a JSON file with the
same names may be the only argument:

    python scripts/convert_checkpoint.py arguments.json
"""

import argparse
import ast
import json
import logging
import sys
from pathlib import Path
from typing import Any

from sparsefinder.commandline.commands import Parser, in_one_line
from sparsefinder.errors import UserError, one_of

LSG_ONLY = {
    "random_global_init": False,
    "global_positional_stride": 64,
    "keep_first_global_token": False,
    "resize_lsg": False,
    "use_token_ids": True,
    "seed": 123,
    "run_test": False,
}
"""Arguments that only `--target lsg` knows, with their defaults."""


_EXAMPLE = '{"initial_model": "roberta-base", "model_name": "lsg-roberta", "model_kwargs": {"block_size": 32}}'


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--initial_model", required=True, help="folder or hub name of the model to convert")
    add("--model_name", required=True, help="folder to save the result in; it must not exist")
    add("--max_sequence_length", type=int, default=4096, help="longest input of the result, in tokens")
    add("--target", default="lsg", help="lsg, longformer, nystromformer, bigbird or led")
    add("--architecture", help="class to load, e.g. RobertaForSequenceClassification; default: the checkpoint's")
    add("--model_kwargs", default="{}", help="settings, e.g. \"{'sparsity_type': 'lsh', 'mask_first_token': true}\"")
    lsg = parser.add_argument_group("only for --target lsg")
    add = lsg.add_argument
    add("--random_global_init", **_FLAG, help="draw global tokens after the first at random")
    add("--global_positional_stride", type=int, default=64, help="distance of the global tokens' positions")
    add("--keep_first_global_token", **_FLAG, help="of an LSG model, keep the first global token")
    add("--resize_lsg", **_FLAG, help="of an LSG model, only lengthen the positions")
    add("--use_token_ids", **{**_FLAG, "default": True}, help="add token type 0 to global tokens (the default)")
    add("--dont_use_token_ids", dest="use_token_ids", nargs="?", const=False, type=_no, help="do not")
    add("--seed", type=int, default=123, help="seed of what is drawn")
    add("--run_test", **_FLAG, help="load the result by every Auto class and run it")
    add("--use_auth_token", **_FLAG, help="accepted and ignored: a saved hub login is always used")
    given = sys.argv[1:] if arguments is None else arguments
    return parser.parse_args(read_json(Path(given[0])) if len(given) == 1 and given[0].endswith(".json") else given)


def read_json(path: Path) -> list[str]:
    """A JSON file of arguments, as it would be typed; null leaves an argument out. Raises `UserError` for another file."""
    try:
        content = json.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a JSON file of arguments") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({' '.join(str(error).split())}); write {_EXAMPLE}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no arguments but a {type(content).__name__}; write {_EXAMPLE}")
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in content.items()}
    return [f"--{name}={text}" for name, text in texts.items() if content[name] is not None]


def parse_settings(given: str) -> dict[str, Any]:
    """`--model_kwargs`, written as JSON, with single quotes, or as a Python dictionary. Raises `UserError` otherwise."""
    for read in (json.loads, lambda text: json.loads(text.replace("'", '"')), ast.literal_eval):
        try:
            settings = read(given)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(settings, dict) and all(isinstance(name, str) for name in settings):
            return settings
    raise UserError(
        f"--model_kwargs {given!r} is not a dictionary of settings; write for instance "
        "\"{'sparsity_type': 'lsh', 'block_size': 32, 'mask_first_token': true}\""
    )


def run(arguments: argparse.Namespace) -> None:
    """Convert, save and report. Raises `UserError` for wrong values."""
    settings = parse_settings(arguments.model_kwargs)
    common = (arguments.initial_model, arguments.model_name, arguments.max_sequence_length)
    if arguments.target == "lsg":
        from sparsefinder.lsg import convert

        chosen = {name: getattr(arguments, name) for name in LSG_ONLY if name != "run_test"}
        convert(*common, architecture=arguments.architecture, model_kwargs=settings, **chosen)
    else:
        from sparsefinder.conversions import TARGETS, convert_checkpoint

        if arguments.target not in TARGETS:
            raise UserError(f"target {arguments.target!r} is unknown; {one_of(['lsg', *TARGETS], arguments.target)}")
        foreign = [f"--{name}" for name, default in LSG_ONLY.items() if getattr(arguments, name) != default]
        if foreign:
            raise UserError(f"{', '.join(foreign)} belongs to --target lsg; leave it out for {arguments.target}")
        convert_checkpoint(*common, target=arguments.target, architecture=arguments.architecture, settings=settings)
    _report(arguments)


def _report(arguments: argparse.Namespace) -> None:
    from sparsefinder.conversions.certificate import read

    checks = read(arguments.model_name).checks
    print(f"{arguments.model_name}: converted to {arguments.target}, {len(checks)} checks passed (conversion.json)")
    if arguments.run_test:
        from sparsefinder.lsg.smoke_test import try_heads

        for line in try_heads(arguments.model_name):
            print(line)


def _yes(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def _no(text: str) -> bool:
    return not _yes(text)


_FLAG: dict[str, Any] = {"nargs": "?", "const": True, "default": False, "type": _yes}


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when all went well, 2 for wrong input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return in_one_line(lambda: run(parse(arguments)), "nothing is half written; run the same command again")


def command() -> None:
    """The console command ``sparsefinder-convert``."""
    sys.exit(main())


if __name__ == "__main__":
    sys.exit(main())
