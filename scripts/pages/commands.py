"""The page of the commands, their keys and their exit codes."""

from __future__ import annotations

from halos.cli import COMMANDS
from halos.config.yaml_comments import header, keys, keys_with_bases
from halos.processes.signals import EXIT_CODE
from scripts.pages.config_keys import CONF
from scripts.pages.text import page, table

OTHERS = {
    "scripts/consolidate.py FOLDER FILE": "makes one checkpoint file of a sharded folder",
    "scripts/plot_values.py loss=kto,dpo output=values.png": "draws value functions, and says which losses are HALOs",
    "scripts/plot_run.py RUN rewards.png": "draws the rewards and the KL of a run",
    "scripts/benchmark.py": "measures speed and memory next to TRL and a plain loop",
    "scripts/faults.py --count 20": "kills runs at random moments and compares what comes out",
    "scripts/build_toy.py": "rebuilds the reference policy of the toy world",
    "scripts/write_docs.py": "writes the pages of this documentation that are made from the code",
    "scripts/audit.py": "looks the pinned packages up among known vulnerabilities",
}
EXITS = {
    "0": "The command succeeded.",
    "1": "It failed. The last line begins with `error:` and says what was expected, what was found and what to do. "
    "What was not expected is printed as a traceback before it.",
    str(EXIT_CODE): "A signal ended the run (SIGTERM, SIGINT or SIGUSR1) after a checkpoint, where there was a step to "
    "save. The same words with `resume=auto` continue it.",
    "130": "Ctrl-C twice ended it at once, without a new checkpoint.",
}


def commands_page() -> str:
    """Return the page of the commands."""
    rows = [(f"`halos {name}`", f"`scripts/{_script(name)}.py`", COMMANDS[name].meaning) for name in COMMANDS]
    blocks: list[str | list[str]] = [
        "# Commands and exit codes",
        "<!-- written by `python scripts/write_docs.py` from the comments in conf/ -->",
        "Each command has two names: `halos NAME` after an installation, and a script in a checkout. "
        "Both take the same words. `halos` alone lists the commands, and `--help` the keys of one.",
        table(("installed", "in a checkout", "what it does"), rows),
        "`train`, `cache-reference` and `estimate` have the same [keys](config.md). `data` has the groups `data` and "
        "`model` of that page, and the keys below.",
        "Further scripts are for the checkout only:",
        table(("script", "what it does"), [(f"`{words}`", meaning) for words, meaning in OTHERS.items()]),
        "## Exit codes",
        table(("code", "meaning"), EXITS.items()),
        "`scripts/audit.py` exits with 1 for a known vulnerability and with 2 where it could not look everything up; "
        "`scripts/faults.py` exits with 1 if a run came out wrong.",
        "## Several runs, and the shell",
        "`-m` runs a sweep: `loss=kto,dpo seed=0,1` gives four runs. "
        "`--config-dir DIR` adds a folder with your own YAML. "
        "`--cfg job` prints the configuration and runs nothing. "
        '`eval "$(python scripts/train.py -sc install=bash)"` completes groups, options and keys in the shell.',
    ]
    for name, command in COMMANDS.items():
        if command.config == "train":
            continue
        file = CONF / f"{command.config}.yaml"
        own_first = dict.fromkeys((*keys(file), *keys_with_bases(file)))
        cells = [(f"`{key.name}`", f"`{key.default}`", key.comment) for key in own_first]
        example = header(file).partition("Shows what")[0].strip()
        blocks += [f"## halos {name}", f"    {example}", table(("key", "default", "meaning"), cells)]
    return page(*blocks)


def _script(name: str) -> str:
    return name.replace("-", "_")
