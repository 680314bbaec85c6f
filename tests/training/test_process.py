"""Signals and the launcher's silence."""

import logging
import os
import signal

import pytest

from deq_lm.errors import ConfigError
from deq_lm.training.process import StopSignal, check_processes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_handlers_are_given_back(number):
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with StopSignal() as stop:
        assert stop.number is None
        os.kill(os.getpid(), number)
        assert stop.number == number
        assert {n: signal.getsignal(n) for n in before} == before  # a second signal acts at once
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_second_interrupt_is_not_swallowed():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with StopSignal():
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_launcher_that_started_one_process_of_several_is_noticed(monkeypatch, caplog):
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with caplog.at_level(logging.WARNING):
        check_processes(1)
    assert "recipes/accelerate/cpu_2.yaml" in caplog.text


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"2 processes .* do not know of each other.*ACCELERATE_USE_CPU=true"):
        check_processes(1)


def test_a_single_or_a_complete_launch_is_not_warned_about(monkeypatch, caplog):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    check_processes(1)
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    assert caplog.text == ""
