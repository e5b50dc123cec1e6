"""A model belongs to one recording at a time; other threads, tasks and copies are left alone."""

import asyncio
import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from watched import Function, X

from stabilitykit.errors import MisuseError
from stabilitykit.recorder import record
from stabilitykit.records import Level, Recording


def test_a_second_recording_of_a_model_is_refused_before_its_pass() -> None:
    model = Function()
    with torch.no_grad(), record(model, formats=()) as first:
        for part in (model, model.inner, nn.Sequential(model)):
            with pytest.raises(MisuseError, match="already recording"), record(part):
                raise AssertionError("the block ran")
        model(X)
    assert "matmul" in {record.operator for record in first}
    with torch.no_grad(), record(model, formats=()) as again:
        model(X)
    assert len(again) == len(first)


def test_a_second_recording_in_another_thread_is_refused() -> None:
    model = Function()
    with ThreadPoolExecutor(1) as pool, torch.no_grad(), record(model, formats=()) as recording:
        model(X)

        def second() -> None:
            with record(model, formats=()):
                model(X)

        with pytest.raises(MisuseError, match="already recording"):
            pool.submit(second).result()
        model(X)
    assert recording.header.starts == (0, 0)


def test_a_second_recording_in_another_task_is_refused() -> None:
    model = Function()

    async def run(begun: asyncio.Event, go_on: asyncio.Event) -> Recording:
        with record(model, formats=()) as recording:
            begun.set()
            await go_on.wait()
            model(X)
        return recording

    async def both() -> Recording:
        begun, go_on = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(run(begun, go_on))
        await begun.wait()
        with pytest.raises(MisuseError, match="already recording"):
            await run(asyncio.Event(), go_on)
        go_on.set()
        return await first

    assert asyncio.run(both()).header.starts == (0,)


def test_blocks_of_two_tasks_may_end_in_any_order() -> None:
    in_mode = torch.utils._python_dispatch.is_in_torch_dispatch_mode

    async def run(begun: asyncio.Event, go_on: asyncio.Event) -> list[str]:
        model = Function(lambda x: x.exp())
        with record(model, formats=()) as recording:
            begun.set()
            await go_on.wait()
            assert in_mode()
            model(X)
        return [record.site for record in recording if record.module != "outside"]

    async def both() -> list[list[str]]:
        events = [asyncio.Event() for _ in range(4)]
        first, second = (asyncio.create_task(run(*events[i : i + 2])) for i in (0, 2))
        await events[0].wait()
        await events[2].wait()
        events[1].set()
        found = [await first]
        events[3].set()
        return [*found, await second]

    one, other = asyncio.run(both())
    assert one == other
    assert len(one) > 1
    assert not in_mode()
    assert torch._C._len_torch_dispatch_stack() == 0


def test_blocks_of_two_threads_may_overlap_and_leave_nothing_behind() -> None:
    """Torch notes for the whole process that a mode is on, and may then compile nothing."""
    noted = torch.utils._python_dispatch.is_in_torch_dispatch_mode
    left_alone = torch.utils._python_dispatch.is_in_any_mode_without_ignore_compile_internals
    begun, ends = threading.Event(), threading.Event()

    def first() -> None:
        model = Function()
        with torch.no_grad(), record(model, formats=()):
            model(X)
            begun.set()
            assert ends.wait(60)

    model = Function()
    with ThreadPoolExecutor() as pool:
        other = pool.submit(first)
        assert begun.wait(60)
        with torch.no_grad(), record(model, formats=()):
            model(X)
            ends.set()
            other.result()
            assert noted()
    assert not noted()
    assert not left_alone()


def test_passes_in_other_threads_are_not_mixed_in(level: Level) -> None:
    model = Function(lambda x: x.exp())
    with torch.no_grad(), record(model, formats=(), level=level) as alone:
        model(X)
    with torch.no_grad(), record(model, formats=(), level=level) as recording:
        others = [threading.Thread(target=model, args=(X,)) for _ in range(3)]
        for other in others:
            other.start()
        model(X)
        for other in others:
            other.join()
    assert [record.site for record in recording] == [record.site for record in alone]
    assert recording.header.starts == (0,)


def test_replicas_in_threads_are_left_alone() -> None:
    """As `nn.DataParallel` runs them: modules that share their hooks with the recorded one."""
    model = Function(lambda x: x.exp())
    replicas = [copy.copy(model) for _ in range(2)]
    with torch.no_grad(), record(model, formats=()) as recording, ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda replica: replica(X), replicas))
        model(X)
    assert torch.equal(found[0], found[1])
    assert recording.header.starts == (0,)


def test_recordings_of_two_models_in_two_threads_do_not_mix() -> None:
    barrier = threading.Barrier(2)

    def run(scale: float) -> Recording:
        model = Function(lambda x: x * scale)
        with torch.no_grad(), record(model, formats=()) as recording:
            for _ in range(5):
                barrier.wait()
                model(X)
        return recording

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, (2.0, 4.0))
    assert len(one) == len(other) == len(run_alone(barrier))
    assert one.at("/mul.0").amax != other.at("/mul.0").amax


def run_alone(barrier: threading.Barrier) -> Recording:
    model = Function(lambda x: x * 2.0)
    with torch.no_grad(), record(model, formats=()) as recording:
        for _ in range(5):
            model(X)
    return recording
