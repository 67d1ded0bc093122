"""One answer at a time, a short queue, and places that are given up by who leaves."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from phatgoose.errors import RoutingError
from phatgoose.ui import queue as module
from phatgoose.ui.queue import AnswerQueue, Busy


def run(coroutine):
    """In a thread, since a browser's tests keep a loop in this one."""
    with ThreadPoolExecutor(1) as one:
        return one.submit(asyncio.run, coroutine).result()


async def collected(turns, job):
    return [event async for event in turns.events(job)]


def test_jobs_run_one_after_the_other_and_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(module, "KEEP_ALIVE_SECONDS", 0.02)
    go, running, most = threading.Event(), [], []

    def work(number):
        def job_of(job):
            running.append(number)
            most.append(len(running))
            go.wait(10)
            job.send({"event": "told", "number": number})
            running.remove(number)

        return job_of

    async def main():
        turns = AnswerQueue(waiting=2)
        jobs = [turns.submit(work(i)) for i in range(3)]
        with pytest.raises(Busy, match="3 answers"):
            turns.submit(work(9))
        third = asyncio.create_task(collected(turns, jobs[2]))
        await asyncio.sleep(0.2)
        go.set()
        found = [await collected(turns, jobs[0]), await collected(turns, jobs[1]), await third]
        later = await collected(turns, turns.submit(work(4)))  # there is room again
        turns.close()
        return found, later

    (first, second, third), later = run(main())
    assert first[-1] == {"event": "told", "number": 0}
    assert second[-1]["number"] == 1
    assert third[0] == {"event": "waiting", "before": 2}
    assert third[-1]["number"] == 2
    assert later[-1]["number"] == 4
    assert set(most) == {1}


def test_who_leaves_frees_a_place_and_never_runs():
    go, ran = threading.Event(), []

    async def main():
        turns = AnswerQueue(waiting=1)
        first = turns.submit(lambda job: go.wait(10))
        second = turns.submit(lambda job: ran.append("second"))
        turns.leave(second)
        third = turns.submit(lambda job: ran.append("third"))
        turns.leave(first)
        assert first.stopped.is_set()
        go.set()
        for job in (first, second, third):
            await collected(turns, job)
        turns.leave(first)  # long over
        turns.close()

    run(main())
    assert ran == ["third"]


def test_errors_are_told_and_the_next_one_runs(caplog):
    def refuse(job):
        raise RoutingError("no such thing")

    def break_down(job):
        raise ZeroDivisionError("secret text of a prompt")

    async def main():
        turns = AnswerQueue(waiting=5)
        jobs = [turns.submit(work) for work in (refuse, break_down, lambda job: job.send({"event": "end"}))]
        found = [await collected(turns, job) for job in jobs]
        turns.close()
        return found

    refused, broken, fine = run(main())
    assert refused == [{"event": "error", "message": "no such thing"}]
    assert broken[0]["message"].startswith("ZeroDivisionError")
    assert "secret" not in broken[0]["message"]
    assert "an answer failed" in caplog.text
    assert fine == [{"event": "end"}]


def test_closing_stops_what_runs():
    begun = threading.Event()

    def wait(job):
        begun.set()
        assert job.stopped.wait(10)

    async def main():
        turns = AnswerQueue(waiting=1)
        turns.submit(wait)
        turns.submit(wait)
        await asyncio.to_thread(begun.wait)
        turns.close()

    run(main())
