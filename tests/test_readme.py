"""README.md and tests/bench/RESULTS.md say what is true. Every command is taken by the program that it names. Every
file and test that they name exists. What the README quotes is what the programs print or contain.
"""

import ast
import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT

import train

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "tests" / "bench" / "RESULTS.md").read_text()
LINES = re.sub(r"```(python|mermaid).*?```", "", README, flags=re.DOTALL).splitlines()
CODE = [line[4:] for line in LINES if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", README + RESULTS)
# without comments, without what is installed first, and without those that leave something open (..., NAME)
COMMANDS = sorted({command for code in CODE for command in [re.sub(r"\s+# .*", "", code).split(" && ")[-1]]
                   if re.match(r"python [\w/]+\.py\b|torchrun ", command) and not re.search(r"\.\.\.|NAME", command)})


def split(command: str) -> tuple[str, list[str]]:
    """A command line -> its program, a path from the root, and the program's arguments. torchrun's are checked here."""
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser
        known = get_args_parser().parse_args(words[1:at + 1])                           # exits at an unknown option
        assert known.training_script == words[at]
    else:
        assert at == 1, command
    return words[at], words[at + 1:]


def test_there_are_commands_to_check():
    programs = [split(command)[0] for command in COMMANDS]
    assert programs.count("train.py") >= 10 and programs.count("scaling.py") >= 2 and "tests/bench/sweep.py" in programs
    assert sum(command.startswith("torchrun") for command in COMMANDS) >= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_taken_by_its_program(command, monkeypatch, capsys):
    program, argv = split(command)
    assert (ROOT / program).is_file()
    if program == "train.py":
        parent = {"seq_len": 256, "position": "rope"}                           # as SFT leaves it; it need not be there
        monkeypatch.setattr(train, "parent_fields", lambda folder: parent)
        train.parse_config(argv)
    elif argv:
        subcommand = [] if argv[0].startswith("-") else argv[:1]
        monkeypatch.setattr(sys, "argv", [program, *subcommand, "--help"])
        with pytest.raises(SystemExit) as done:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        flags = {word.split("=")[0] for word in argv if word.startswith("--")}
        assert not done.value.code and flags <= set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))


def quoted_after(command: str) -> list[str]:
    """The lines that the README shows under a command."""
    lines = LINES[LINES.index("    " + command) + 1:]
    return [line[4:] for line in lines[:next(i for i, line in enumerate(lines) if not line.startswith("    "))]]


@pytest.mark.parametrize("command", [command for command in COMMANDS if "--dry-run" in command])
def test_dry_runs_print_what_is_quoted(command, capsys):
    assert train.main(split(command)[1]) == 0
    printed, quoted = capsys.readouterr().out.splitlines(), quoted_after(command)
    assert quoted and set(quoted) <= set(printed), "\n".join(printed)
    # and in words
    seconds, dollars = re.search(r"about (\S+) on", quoted[0])[1], re.search(r"\$(\d+)", quoted[1])[1]
    minutes, seconds = map(int, seconds.split(":"))
    assert f"{(minutes * 60 + seconds) / 3600:.2f} hours and {dollars} dollars" in README


def test_the_first_run_begins_as_quoted(monkeypatch, capsys):
    monkeypatch.setattr(train, "time_tokens", lambda c, device: 1e9)
    assert train.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    for label in ("model", "run", "memory"):
        line, = (line[4:] for line in LINES if line.startswith(f"    {label}  "))
        assert line in printed


def code_lines(source: str) -> list[str]:
    """Lines of Python without comments, in which space does not count."""
    return [bare for line in source.splitlines() if (bare := re.sub(r"\s+", "", re.sub(r"\s# .*", "", line)))]


def test_the_textbook_loop_is_trains():
    block = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    source = (ROOT / "train.py").read_text()
    loop, = (node for node in ast.parse(source).body if getattr(node, "name", "") == "textbook_loop")
    real = code_lines("\n".join(source.splitlines()[loop.body[1].lineno - 1:loop.end_lineno]))     # after its docstring
    assert code_lines(block) == real and len(real) > 15
    assert {name for name in re.findall(r"(\w+\.py)", block)} == {path.name for path in ROOT.glob("*.py")}


@pytest.mark.parametrize("name, text", [("README.md", README), ("tests/bench/RESULTS.md", RESULTS)])
def test_files_and_tests_that_are_named_exist(name, text):
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    for link in links:
        assert ((ROOT / name).parent / link).exists(), link
    for path in re.findall(r"[\w/]+\.py\b", text):
        assert "NAME" in path or (ROOT / path).exists(), path
    for path, test in re.findall(r"(tests/\w+\.py)::(\w+)", text):
        assert f"def {test}(" in (ROOT / path).read_text(), test
    assert links or name != "README.md"


def test_objects_to_change_are_where_they_are_said_to_be():
    rows = re.findall(r"\| \[(\w+\.py)\]\(\S+\), (`.*?) \|", README)
    assert len(rows) >= 6
    for path, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def|class) {name}\b|^{name} = ", (ROOT / path).read_text(), re.MULTILINE), name


def test_minutes_are_those_of_ten_lines_each():
    """Lines of the lecture that are not blank; the README rounds to five minutes, and a file may grow a little."""
    table = re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", README, re.MULTILINE)
    assert {name for name, _ in table} == {path.name for path in ROOT.glob("*.py")}
    for name, minutes in table:
        lecture, *_ = (ROOT / name).read_text().split("# ---- the lecture ends here")
        real = sum(bool(line.strip()) for line in lecture.splitlines()) / 10
        assert abs(int(minutes) - real) <= 5 + real / 10, f"{name}: {5 * round(real / 5)} minutes"


def test_headlines_are_measured_rows():
    """Each figure of the README's table stands in RESULTS.md, next to the machine."""
    rows = [row.strip("| ").split(" | ") for row in README.split("## Measured")[1].split("## ")[0].splitlines()
            if re.search(r"\| (EPYC|Xeon|H200), ", row)]
    assert len(rows) == 8
    for row in rows:
        measured, machine = row[1], row[-1]
        assert any(measured in line and machine in line for line in RESULTS.splitlines()), row
    assert all(";" not in cell for row in re.findall(r"^\|.*\|$", RESULTS, re.MULTILINE)                # one per cell
               for cell in row.split(" | ")[1:3])


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 170
