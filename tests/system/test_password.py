"""Passwords: vmbusctl at a terminal, with polkit's own text agent, helper and PAM."""

from __future__ import annotations

import shlex

import pytest

from tests.system.machine import Machine
from tests.system.test_service import guest

PASSWORD = "open sesame"


@pytest.fixture(scope="module")
def carols(machine: Machine) -> Machine:
    """A machine with a user who is asked for her password."""
    machine.run("useradd", "--create-home", "carol")
    machine.run("chpasswd", stdin=f"carol:{PASSWORD}\n")
    return machine


def attempt(*arguments: str) -> str:
    """A script that runs vmbusctl, says how it ended, and what the terminal is then like."""
    return f"trap : INT; {shlex.join(['vmbusctl', *arguments])}; echo status: $?.; stty -a"


def agents(machine: Machine) -> str:
    """The agents that run."""
    return machine.run("sh", "-c", "grep -l pkttyagent /proc/[0-9]*/comm || true")


def test_who_gives_her_password_has_her_vm_run(carols: Machine) -> None:
    """It is asked for once, and what is typed then is the guest's."""
    script = attempt("run", "--name", "carols", *guest("echo hearing; read a; echo told: $a"))
    with carols.at_terminal(script, user="carol") as program:
        program.answer("Password: ", PASSWORD)
        said = program.until("hearing")
        assert "AUTHENTICATING FOR org.vmbus1.create" in said
        assert "AUTHENTICATION COMPLETE" in said
        program.type("hello\n")
        assert "told: hello" in program.until("status: 0.")
    assert agents(carols) == ""


def test_wrong_password_ends_in_an_error_that_names_the_action(carols: Machine) -> None:
    """In one line; and no VM is made."""
    with carols.at_terminal(attempt("create", *guest("true")), user="carol") as program:
        program.answer("Password: ", "guess")
        said = program.until("status: 1.")
    (line,) = (line for line in said.splitlines() if "vmbusctl: " in line)
    assert "org.vmbus1.create" in line
    assert carols.run("vmbusctl", "--json", "list") == "[]"


def test_interrupted_question_leaves_the_terminal_as_it_was(carols: Machine) -> None:
    """What is typed is shown again, and no agent is left."""
    with carols.at_terminal(attempt("create", *guest("true")), user="carol") as program:
        program.until("Password: ")
        program.type("\x03")
        program.until("status: 130.")
        assert " echo " in program.until("echoctl")
    assert agents(carols) == ""
