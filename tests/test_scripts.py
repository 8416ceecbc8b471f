"""The shell scripts: what they install and when, what they run, what they say. Beside them stand-ins for Python's
pip and for the installed program, since it is the scripts that are tested here; the journeys run the real thing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train.sh", "scripts/setup.sh", "scripts/test.sh", "scripts/check.sh", ".ci/run")
COMMANDS = "bash sh env cat cksum cp dirname grep ls mkdir rm sed sleep tail tee tr".split()

# A Python whose pip writes down what it was asked for, and fails for what $PIP_FAILS (a regular expression) matches.
PYTHON = f"""#!/usr/bin/env bash
here=$(cd "$(dirname "$0")" && pwd)
case "$1 $2" in
    "-m pip")
        [ "$3" = --version ] && exit
        echo "pip ${{*:3}}" >> "$STAND_IN_LOG"
        if [ -n "${{PIP_FAILS:-}}" ] && [[ "$*" =~ $PIP_FAILS ]]; then echo "ERROR: no such thing"; exit 1; fi
        echo "  Downloading https://example.org/torch-2.13.0.whl (191.8 MB)"
        cp "$STAND_IN_PROGRAM" "$here/sana_tune"
        ;;
    "-m venv")
        echo "venv ${{*:3}}" >> "$STAND_IN_LOG"
        rm -rf "${{@: -1}}" && mkdir -p "${{@: -1}}/bin" && cp "$0" "${{@: -1}}/bin/python"
        [ -z "${{VENV_FAILS:-}}" ]
        ;;
    "-m pytest" | "-m ruff") echo "python $*" ;;
    "-c import importlib.metadata"*) [ -n "${{HAS_TORCH:-}}" ] ;;
    "- "*) cat > /dev/null; [ -n "${{HAS_TORCH:-}}" ] ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
PROGRAM = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/}" "$@"
echo "MIXED_PRECISION=${MIXED_PRECISION:-} CONFIG_PATH=${CONFIG_PATH:-} ENV=${ENV:-} HERE=$PWD"
exit "${PROGRAM_ENDS_WITH:-0}"
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return path


@dataclass
class Checkout:
    """A copy of the scripts with nothing installed, a PATH with stand-ins in front, and a folder to work in."""

    root: Path
    tools: Path
    work: Path
    environ: dict[str, str]

    def run(self, script: str, *arguments: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess:
        """Run a script from the working folder."""
        command = [str(self.root / script), *arguments]
        return subprocess.run(
            command, cwd=cwd or self.work, env={**self.environ, **environ}, capture_output=True, text=True, timeout=60
        )

    def called(self) -> list[str]:
        """What pip and venv were asked for since the last time."""
        log = Path(self.environ["STAND_IN_LOG"])
        lines = log.read_text("utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def config(self, path: str = "config/config.json") -> None:
        file = self.work / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}", encoding="utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "a checkout"  # a blank in the path, as people have it
    for name in (*SCRIPTS, "pyproject.toml", "constraints.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, root / name)
    tools, work = tmp_path / "tools", tmp_path / "work"
    work.mkdir()
    for name in ("python3", "python3.13", "python3.12", "python3.11"):
        executable(tools / name, PYTHON if name == "python3" else "#!/bin/sh\nexit 127\n")
    executable(tools / "uname", "#!/bin/sh\necho Linux\n")
    program = executable(tmp_path / "program", PROGRAM)
    for name in COMMANDS:  # and no others: a machine's own nvidia-smi or Python would be found
        (tools / name).symlink_to(shutil.which(name) or pytest.fail(f"no {name} here"))
    kept = {name: os.environ[name] for name in ("HOME", "TMPDIR", "LANG") if name in os.environ}
    environ = {
        **kept,
        "PATH": str(tools),
        "STAND_IN_LOG": str(tmp_path / "called"),
        "STAND_IN_PROGRAM": str(program),
        "PIP_FAILS": "--no-index",  # as where no wheel was laid out
    }
    return Checkout(root, tools, work, environ)


def test_the_scripts_can_be_run():
    assert len(SCRIPTS) == 5
    for name in SCRIPTS:
        assert os.access(ROOT / name, os.X_OK), name
        text = (ROOT / name).read_text("utf-8")
        assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text, name


# --- set-up -----------------------------------------------------------------------------------------------------------


def test_set_up_installs_once(checkout):
    first = checkout.run("scripts/setup.sh")
    assert first.returncode == 0, first.stderr
    assert first.stdout == f"{checkout.root}/.venv/bin\n"
    assert "torch-2.13.0.whl (191.8 MB)" in first.stderr
    called = checkout.called()
    assert called[0] == f"venv --clear {checkout.root}/.venv"
    assert called[-1].startswith("pip install ") and called[-1].endswith(f"-c {checkout.root}/constraints.txt -e .")
    second = checkout.run("scripts/setup.sh")
    assert (second.returncode, second.stdout, second.stderr) == (0, first.stdout, "")
    assert checkout.called() == []


def test_set_up_adds_what_the_tests_need_and_takes_nothing_away(checkout):
    for level, wanted in (("", "-e ."), ("test", "-e .[test]"), ("dev", "-e .[dev]")):
        assert checkout.run("scripts/setup.sh", *filter(None, [level])).returncode == 0
        assert checkout.called()[-1].endswith(wanted)
    for level in ("", "test", "dev"):
        assert checkout.run("scripts/setup.sh", *filter(None, [level])).returncode == 0
    assert checkout.called() == []
    assert checkout.run("scripts/setup.sh", "tset").returncode == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_set_up_installs_again_when_something_else_is_asked_for(checkout, name):
    checkout.run("scripts/setup.sh")
    checkout.called()
    with open(checkout.root / name, "a", encoding="utf-8") as file:
        file.write("# more\n")
    assert checkout.run("scripts/setup.sh", DISABLE_UPDATES="1").returncode == 0
    assert checkout.called() == []
    assert checkout.run("scripts/setup.sh", HAS_TORCH="1").returncode == 0
    (call,) = checkout.called()
    assert call.endswith("-e .")


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock here")
def test_two_set_ups_at_once_install_once(checkout):
    (checkout.tools / "flock").symlink_to(shutil.which("flock"))
    command = [str(checkout.root / "scripts" / "setup.sh")]
    both = [subprocess.Popen(command, env=checkout.environ, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    called = checkout.called()
    assert len([call for call in called if call.endswith("-e .")]) == 1
    assert len([call for call in called if call.startswith("venv")]) == 1


def test_a_failed_installation_says_so_and_is_tried_again(checkout):
    failed = checkout.run("scripts/setup.sh", PIP_FAILS="-e")
    assert failed.returncode == 1 and failed.stdout == ""
    assert "ERROR: no such thing" in failed.stderr and "pip could not install sana_tune" in failed.stderr
    assert f"{checkout.root}/.venv/sana_tune-setup.log" in failed.stderr
    checkout.called()
    assert checkout.run("scripts/setup.sh").returncode == 0
    assert checkout.called()[-1].endswith("-e .")


def test_half_an_environment_is_not_left_behind(checkout):
    failed = checkout.run("scripts/setup.sh", VENV_FAILS="1")
    assert failed.returncode == 1 and "could not make" in failed.stderr
    assert not (checkout.root / ".venv").exists()


def test_a_broken_environment_is_made_anew(checkout):
    environment = checkout.root / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "pyvenv.cfg").touch()
    (environment / "bin" / "python").symlink_to("/nowhere/python3")
    assert checkout.run("scripts/setup.sh").returncode == 0
    assert checkout.called()[0].startswith("venv --clear")


def test_a_folder_of_other_things_is_left_alone(checkout):
    (checkout.work / "mine").mkdir()
    (checkout.work / "mine" / "picture.png").touch()
    ran = checkout.run("scripts/setup.sh", VENV_PATH="mine")
    assert ran.returncode == 1 and "not a Python environment" in ran.stderr
    assert checkout.called() == [] and os.listdir(checkout.work / "mine") == ["picture.png"]


def test_the_active_environment_is_used(checkout):
    active = checkout.work / "active"
    executable(active / "bin" / "python", PYTHON)
    for variables in ({"VIRTUAL_ENV": str(active)}, {"CONDA_PREFIX": str(active), "CONDA_DEFAULT_ENV": "sana"}):
        assert checkout.run("scripts/setup.sh", **variables).stdout == f"{active}/bin\n"
    other = {"VENV_PATH": "chosen", "VIRTUAL_ENV": str(active)}
    assert checkout.run("scripts/setup.sh", **other).stdout == f"{checkout.work}/chosen/bin\n"
    for variables in ({"CONDA_PREFIX": str(active), "CONDA_DEFAULT_ENV": "base"}, {"VIRTUAL_ENV": "/nowhere"}):
        assert checkout.run("scripts/setup.sh", **variables).stdout == f"{checkout.root}/.venv/bin\n"


def test_the_torch_of_an_active_environment_is_kept(checkout):
    active = checkout.work / "active"
    executable(active / "bin" / "python", PYTHON)
    ran = checkout.run("scripts/setup.sh", VIRTUAL_ENV=str(active), HAS_TORCH="1")
    assert ran.returncode == 0 and "is kept" in ran.stderr
    (call,) = checkout.called()
    assert f"-c {active}/sana_tune-constraints.txt" in call
    pins = (active / "sana_tune-constraints.txt").read_text("utf-8")
    assert "torch==" not in pins.splitlines() and "\ndiffusers==" in pins and "\ntorch-optimi==" in pins


def test_an_active_environment_too_old_is_refused(checkout):
    active = checkout.work / "active"
    executable(active / "bin" / "python", '#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n')
    ran = checkout.run("scripts/setup.sh", VIRTUAL_ENV=str(active))
    assert ran.returncode == 1 and "Python 3.9.2" in ran.stderr and "deactivate" in ran.stderr


def test_a_python_that_does_not_run_is_passed_over(checkout):
    executable(checkout.tools / "python3", "#!/bin/sh\nexit 127\n")
    executable(checkout.tools / "python3.12", PYTHON)
    assert checkout.run("scripts/setup.sh").returncode == 0
    assert checkout.called()[0].startswith("venv")


def test_no_fitting_python_says_what_is_needed(checkout):
    executable(checkout.tools / "python3", "#!/bin/sh\nexit 127\n")
    ran = checkout.run("scripts/setup.sh")
    assert ran.returncode == 1 and "Python 3.11, 3.12 or 3.13 is needed" in ran.stderr
    executable(checkout.tools / "python3.11", '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1 ;; esac\n')
    ran = checkout.run("scripts/setup.sh")
    assert ran.returncode == 1 and "apt install python3.11-venv" in ran.stderr
    other = executable(checkout.work / "my python", PYTHON)
    assert checkout.run("scripts/setup.sh", PYTHON=str(other)).returncode == 0


def torch_calls(checkout: Checkout) -> list[str]:
    return [call for call in checkout.called() if call.endswith(" torch==2.13.0")]


def test_without_a_gpu_torch_is_the_cpu_build(checkout):
    ran = checkout.run("scripts/setup.sh", PIP_FAILS="")
    (local,) = torch_calls(checkout)
    assert "--no-index" in local and "a local wheel fits" in ran.stderr
    shutil.rmtree(checkout.root / ".venv")
    ran = checkout.run("scripts/setup.sh")
    _, remote = torch_calls(checkout)
    assert "--index-url https://download.pytorch.org/whl/cpu" in remote and "the CPU build from" in ran.stderr
    shutil.rmtree(checkout.root / ".venv")
    ran = checkout.run("scripts/setup.sh", PIP_FAILS="--no-index|pytorch.org")
    assert ran.returncode == 0 and "that failed" in ran.stderr and "gigabytes" in ran.stderr


def test_with_a_gpu_or_an_index_of_ones_own_torch_comes_from_there(checkout):
    executable(checkout.tools / "nvidia-smi", "#!/bin/sh\n")
    assert checkout.run("scripts/setup.sh").returncode == 0
    assert torch_calls(checkout) == []
    shutil.rmtree(checkout.root / ".venv")
    index = {"SANA_TUNE_TORCH_INDEX": "https://example.org/cu130"}
    assert checkout.run("scripts/setup.sh", **index).returncode == 0
    (call,) = torch_calls(checkout)
    assert "--index-url https://example.org/cu130" in call
    shutil.rmtree(checkout.root / ".venv")
    ran = checkout.run("scripts/setup.sh", PIP_FAILS="example.org", **index)
    assert ran.returncode == 1 and "torch==2.13.0 from https://example.org/cu130" in ran.stderr


# --- train.sh ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """The same with everything installed."""
    assert checkout.run("scripts/setup.sh", "dev").returncode == 0
    checkout.called()
    return checkout


def test_train_prepares_and_passes_all_flags_on(checkout):
    ran = checkout.run("train.sh", "--example", "nano", "--validation_prompt", "a red zib", "--seed=3")
    assert ran.returncode == 0 and checkout.called()
    flags = ["sana_tune", "train", "--example", "nano", "--validation_prompt", "a red zib", "--seed=3"]
    assert ran.stdout.splitlines()[:-1] == flags
    again = checkout.run("train.sh", "--example", "nano")
    assert again.returncode == 0 and again.stderr == "" and checkout.called() == []


def test_train_without_flags_runs_the_config_of_the_folder(ready):
    ready.config()
    ran = ready.run("train.sh")
    assert ran.returncode == 0 and ran.stderr == ""
    assert ran.stdout.splitlines() == ["sana_tune", "train", f"MIXED_PRECISION= CONFIG_PATH= ENV= HERE={ready.work}"]


def test_train_without_config_says_what_to_do(checkout):
    ran = checkout.run("train.sh", "--learning_rate", "1e-5")
    assert ran.returncode == 1 and ran.stdout == ""
    assert "no config/config.json" in ran.stderr and "./train.sh --example nano" in ran.stderr
    assert checkout.called() == []  # told before anything is installed


FLAGS = ["--config=x.json", "--config x.json", "--env mine", "env=mine", "-e nano", "example=nano", "--help"]


def test_a_flag_that_names_the_config_is_the_trainers_business(ready):
    for flags in FLAGS:
        ran = ready.run("train.sh", *flags.split())
        assert ran.returncode == 0 and ran.stdout.splitlines()[2:-1] == flags.split(), flags


def test_variables_that_name_the_config_reach_the_trainer(ready):
    for name in ("ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT", "CONFIG_PATH"):
        ran = ready.run("train.sh", **{name: "mine", "MIXED_PRECISION": "no"})
        assert ran.returncode == 0 and "MIXED_PRECISION=no" in ran.stdout
        assert name.startswith("SIMPLETUNER") or f" {name}=mine" in ran.stdout


def test_the_old_variable_files_are_read_and_not_run(ready):
    """What must be known before Python starts is taken from them; the trainer reads them whole."""
    ready.config("config/mine/config.json")
    (ready.work / "config" / "config.env").write_text(
        "# ours\nexport ENV='mine'  # why\n[ -n $UNSET_NAME ]\nfalse\ntouch was-run\nMIXED_PRECISION=$(touch was-run)\n"
    )
    (ready.work / "config" / "mine" / "config.env").write_text("CONFIG_PATH=config/mine\r\nTRAINING_NUM_MACHINES=1")
    ran = ready.run("train.sh")
    assert ran.returncode == 0 and "MIXED_PRECISION= CONFIG_PATH=config/mine ENV=mine" in ran.stdout
    assert not (ready.work / "was-run").exists()
    (ready.work / "config" / "mine" / "config.env").write_text('  TRAINING_NUM_PROCESSES="many"\n')
    assert "TRAINING_NUM_PROCESSES is many" in ready.run("train.sh").stderr


@pytest.mark.parametrize("name", ["config.toml", "config/config.yaml", "config/config.env"])
def test_a_config_of_another_format_is_one(ready, name):
    (ready.work / "config").mkdir(exist_ok=True)
    (ready.work / name).touch()
    assert ready.run("train.sh").returncode == 0


def test_the_environment_of_venv_path_is_used(checkout):
    checkout.config()
    ran = checkout.run("train.sh", VENV_PATH="env of mine")
    assert ran.returncode == 0 and (checkout.work / "env of mine" / "bin" / "sana_tune").exists()
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize("name", ["TRAINING_NUM_PROCESSES", "TRAINING_NUM_MACHINES"])
def test_a_count_that_is_no_number_is_refused_before_anything_is_installed(checkout, name):
    checkout.config()
    for number in ("-1", "2.5", "many"):
        ran = checkout.run("train.sh", **{name: number})
        assert ran.returncode == 1 and f"{name} is {number}" in ran.stderr and "a number" in ran.stderr
    assert checkout.called() == []
    assert checkout.run("train.sh", **{name: "8"}).returncode == 0


def test_the_exit_code_is_the_trainers(ready):
    ready.config()
    for code in (1, 130):
        assert ready.run("train.sh", PROGRAM_ENDS_WITH=str(code)).returncode == code


def test_a_failed_set_up_does_not_train(checkout):
    checkout.config()
    ran = checkout.run("train.sh", PIP_FAILS="-e")
    assert ran.returncode == 1 and ran.stdout == ""


def test_a_signal_reaches_the_trainer_itself(ready):
    ready.config()
    waiting = "#!/usr/bin/env bash\ntrap 'echo saved; exit 143' TERM\necho started\nwhile :; do sleep 0.05; done\n"
    executable(ready.root / ".venv" / "bin" / "sana_tune", waiting)
    process = subprocess.Popen(
        [str(ready.root / "train.sh")], cwd=ready.work, env=ready.environ, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143 and process.stdout.read() == "saved\n"
    process.stdout.close()


# --- test.sh, check.sh, .ci/run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["scripts/test.sh", ".ci/run"])
def test_the_tests_are_run_from_anywhere_with_any_flag(checkout, script):
    executable(checkout.tools / "nproc", "#!/bin/sh\necho 16\n")
    ran = checkout.run(script, "--full", "tests/data")
    wanted = "python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --full tests/data\n"
    assert ran.returncode == 0 and ran.stdout == wanted
    assert checkout.called()[-1].endswith("-e .[test]")
    assert checkout.run(script).stderr == "" and checkout.called() == []
    for alone in (("-n", "0"), ("--pdb",), ("--gpu",)):
        assert checkout.run(script, *alone).stdout == f"python -m pytest {' '.join(alone)}\n"
    executable(checkout.tools / "nproc", "#!/bin/sh\necho 1\n")
    assert checkout.run(script).stdout == "python -m pytest\n"


def test_ci_installs_a_browser_where_it_may_and_goes_on_where_it_cannot(ready):
    wanted = "python -m pytest tests/watch\n"
    executable(ready.tools / "nproc", "#!/bin/sh\necho 1\n")
    executable(ready.tools / "timeout", '#!/bin/sh\nshift\nexec "$@"\n')
    apt = '#!/bin/sh\necho "apt-get $*" >> "$STAND_IN_LOG"\necho noise\nexit %d\n'
    executable(ready.tools / "apt-get", apt % 0)
    ran = ready.run(".ci/run", "tests/watch", CI_EUID="1000")
    assert (ran.stdout, ran.stderr) == (wanted, "") and ready.called() == []
    ran = ready.run(".ci/run", "tests/watch", CI_EUID="0")
    assert ran.stdout == wanted and "chromium was installed in" in ran.stderr
    assert [line.split()[1] for line in ready.called()] == ["update", "install"]
    executable(ready.tools / "apt-get", apt % 100)
    ran = ready.run(".ci/run", "tests/watch", CI_EUID="0")
    assert (ran.returncode, ran.stdout) == (0, wanted) and "tests that need a browser are skipped" in ran.stderr
    executable(ready.tools / "chromium", "#!/bin/sh\n")
    ready.called()
    assert ready.run(".ci/run", "tests/watch", CI_EUID="0").stderr == "" and ready.called() == []


def test_check_runs_every_check_and_fails_when_one_does(ready):
    tool = "#!/bin/sh\necho ${0##*/} $1 $2\nexit %d\n"
    tools = ready.root / ".venv" / "bin"
    executable(tools / "pyright", tool % 0)
    executable(tools / "ruff", tool % 0)
    assert ready.run("scripts/check.sh").returncode == 0
    executable(tools / "ruff", tool % 1)
    ran = ready.run("scripts/check.sh")
    assert ran.returncode == 1 and len(ran.stdout.splitlines()) == 3
