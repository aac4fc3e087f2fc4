"""A command that is forked behaves as one that a shell starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from mercato.testing.command import COMMAND, Command, clean_environment, run_command
from mercato.testing.process import process_table


def sleeping() -> None:
    os.write(1, b"here\n")
    signal.pause()


def test_what_it_says_and_its_exit_code_are_those_of_a_shell():
    for arguments in (["--help"], ["orders"], ["audit", "--dsn", "nonsense"]):
        there = subprocess.run(
            [*COMMAND, *arguments], capture_output=True, text=True, check=False, cwd="/", env=clean_environment()
        )
        here = run_command(*arguments)
        assert (here.returncode, here.stdout, here.stderr) == (there.returncode, there.stdout, there.stderr)


def test_a_signal_that_ends_it_is_its_exit_code():
    with Command([], environment=clean_environment(), first=sleeping) as command:
        assert command.stdout.readline() == "here\n"
        assert command.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            command.wait(0.01)
        command.kill()
        assert command.wait() == command.returncode == -signal.SIGKILL
        command.terminate()  # does nothing: another process may have its number


def test_one_that_does_not_end_is_killed():
    with (
        Command([], environment=clean_environment(), first=sleeping) as command,
        pytest.raises(subprocess.TimeoutExpired),
    ):
        command.communicate(0.2)
    assert command.returncode == -signal.SIGKILL
    assert command.pid not in process_table()


def own_state() -> None:
    leads = os.getsid(0) == os.getpid()
    line = sys.stdin.readline().strip()
    files = sorted(map(int, os.listdir("/proc/self/fd")))[:3]
    sys.stdout.write(f"{sorted(os.environ)} {os.getcwd()} {leads} {line!r} {files}\n")


def test_it_has_its_own_environment_session_and_streams_and_what_was_done_first():
    environment = {"MERCATO_DATA": "/nowhere", "PATH": "/bin"}
    with Command(["--version"], environment=environment, has_input=True, first=own_state) as command:
        command.stdin.write("a line\n")
        command.stdin.close()
        output, errors = command.communicate()

    assert output.splitlines()[0] == "['MERCATO_DATA', 'PATH'] / True 'a line' [0, 1, 2]"
    assert (errors, command.returncode) == ("", 0)


def test_without_an_input_it_reads_nothing():
    with Command(["--version"], environment=clean_environment(), first=own_state) as command:
        assert "/ True '' [0, 1, 2]" in command.communicate()[0]


def test_what_only_an_interpreter_reads_is_refused():
    with pytest.raises(AssertionError, match="a fork does not read PYTHONIOENCODING"):
        run_command("--version", environment={"PYTHONIOENCODING": "ascii"})
