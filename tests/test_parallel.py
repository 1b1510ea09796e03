"""Jobs on all devices: all done once, keys keep their place, a failure stops the rest."""

import threading
import time

import jax.numpy as jnp
import pytest

from experiments.parallel import devices_for, once, run_in_parallel


def test_every_job_is_done_once_in_the_place_of_its_key():
    done, lock = [], threading.Lock()

    def work(job, device):
        where = jnp.ones(3).devices()
        time.sleep(0.002)
        with lock:
            done.append((job, threading.current_thread().name))
            assert where == {device} == {devices_for(1)[0]}

    jobs = [(key, i) for i in range(4) for key in "abcdef"]
    run_in_parallel(jobs, lambda job: job[0], work, threading.Event())
    assert sorted(job for job, _ in done) == sorted(jobs)
    assert len({place for _, place in done}) == len(devices_for(len(jobs)))


def test_an_idle_core_takes_over_rather_than_wait():
    places, lock = set(), threading.Lock()

    def work(job, device):
        time.sleep(0.02)
        with lock:
            places.add(threading.current_thread().name)

    run_in_parallel(range(8), lambda job: "one", work, threading.Event())
    assert len(places) == len(devices_for(8))


def test_what_threads_ask_for_together_is_made_once():
    made, found = [], []

    @once(keep=2)
    def make(key):
        made.append(key)
        time.sleep(0.02)
        return object()

    def work(job, device):
        found.append(make("a"))

    run_in_parallel(range(8), lambda job: job, work, threading.Event())
    assert made == ["a"] and len(found) == 8 and len(set(map(id, found))) == 1


def test_a_failure_ends_the_others_and_is_what_the_caller_sees():
    several = len(devices_for(3))
    stop, begun, ended = threading.Event(), threading.Barrier(several), []

    def work(job, device):
        begun.wait(10)
        if job == several - 1:
            raise OSError("disk full")
        assert stop.wait(10)
        ended.append(job)
        raise KeyboardInterrupt

    with pytest.raises(OSError, match="disk full"):
        run_in_parallel(range(3), lambda job: job, work, stop)
    assert sorted(ended) == list(range(several - 1))


def test_a_stop_is_an_interrupt():
    stop, done = threading.Event(), []

    def work(job, device):
        done.append(job)
        stop.set()

    with pytest.raises(KeyboardInterrupt):
        run_in_parallel(range(1000), lambda job: job, work, stop)
    assert len(done) < 1000
