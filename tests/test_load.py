"""Loading by several threads, in blocks of rows: the same model as in one piece, and the same error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits.checkpoint import open_checkpoint
from fewbits.checkpoint.files import StoredTensor
from fewbits.engine.llm import LLM
from fewbits.errors import CheckpointError
from fewbits.kernels.cpu import embedding, linear
from fewbits.load import decode, inspect, load
from fewbits.workers import Workers
from tests import make

FIXTURES = Path(__file__).parent / "fixtures"
WITH_CODES = [
    path.name
    for path in sorted(FIXTURES.iterdir())
    if path.is_dir() and not any(part in path.name for part in ("sparse", "marlin", "online"))
]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_BLOCK", 1)
    monkeypatch.setattr(embedding, "_BLOCK", 1)


@pytest.mark.parametrize("name", WITH_CODES)
def test_blocks_of_rows_are_the_rows_of_the_whole(name: str) -> None:
    planned = inspect(FIXTURES / name)
    assert planned.checkpoint is not None
    compared = 0
    with planned.checkpoint.reader() as reader:
        for row in planned.rows:
            if row.resolved is None or row.resolved.error or row.kind not in ("linear", "head", "embedding", "expert"):
                continue
            whole = decode(planned, row, reader)[0].weight
            codes = decode(planned, row, reader, "in blocks")[0].weight.codes
            for begin in range(0, whole.shape[0], 7):
                part = codes[begin : begin + 7]
                assert part.dtype == whole.codes.dtype
                np.testing.assert_array_equal(part, whole.codes[begin : begin + 7])
                compared += len(part)
    assert compared > 0


@pytest.mark.parametrize("name", ["w4a16-asym-g32-head-f32", "w8a16-asym-g32-naive-head", "llama-bf16"])
def test_any_number_of_threads_loads_the_same_model(name: str, small_blocks: None) -> None:
    logits = []
    for threads in (1, 2, 5):
        llm = LLM(FIXTURES / name, threads=threads)
        logits.append(llm.logits([1, 5, 9, 33]).tobytes())
    assert len(set(logits)) == 1


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path, small_blocks: None, threads: int) -> None:
    folder = make.write(tmp_path, make.llama_tensors(), make.llama())
    checkpoint = open_checkpoint(folder)
    path = checkpoint.paths[0]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="it has changed") as caught:
        load(checkpoint, threads=threads)
    assert caught.value.code == "file-size"


def test_an_embedding_without_scales_stays_in_its_file(tmp_path: Path) -> None:
    folder = make.write(tmp_path, make.llama_tensors(), make.llama())
    llm = LLM(folder)
    expected = llm.logits([1, 5, 9])
    checkpoint = open_checkpoint(folder)
    info = checkpoint.tensors[f"{EMBEDDING}.weight"]
    with checkpoint.paths[info.file].open("r+b") as file:
        file.seek(info.begin)
        file.write(bytes(info.nbytes))
    assert not np.array_equal(llm.logits([1, 5, 9]), expected)


EMBEDDING, GATE = "model.embed_tokens", "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize(("bad", "named"), [({GATE: (70, 5)}, GATE), ({GATE: (70, 5), EMBEDDING: (17, 3)}, EMBEDDING)])
def test_the_first_bad_value_is_named_by_its_place_in_the_tensor(
    tmp_path: Path, small_blocks: None, threads: int, bad: dict[str, tuple[int, int]], named: str
) -> None:
    tensors: dict[str, Any] = make.llama_tensors()
    for module, place in bad.items():
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].copy()
        tensors[f"{module}.weight"][place] = np.nan
    folder = make.write(tmp_path, tensors, make.llama())
    for _ in range(5):
        with pytest.raises(CheckpointError) as caught:
            load(folder, threads=threads)
        assert (caught.value.code, caught.value.module) == ("weight-nan", f"{named}.weight")
        assert str(list(bad[named])) in caught.value.what


def test_threads_read_into_memory_of_their_own(tmp_path: Path) -> None:
    folder = make.write(tmp_path, {"a.weight": np.arange(1000, dtype=np.float32).reshape(1000, 1)}, make.llama())
    found: list[bool] = []
    with open_checkpoint(folder).reader() as reader:
        stored = reader.stored("a.weight")

        def read(begin: int) -> None:
            for _ in range(200):
                rows = stored[begin : begin + 10]
                found.append(rows[0, 0] == begin and rows[-1, 0] == begin + 9)

        threads = [threading.Thread(target=read, args=(begin,)) for begin in (0, 500, 990)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 600 and all(found)
    assert isinstance(stored, StoredTensor)


class TestWorkers:
    def test_the_first_failure_in_order_is_raised_however_late_it_comes(self) -> None:
        second_has_failed = threading.Event()

        def fail(name: str, before: Callable[[], object]) -> None:
            before()
            raise ValueError(name)

        def last() -> None:
            second_has_failed.set()

        with pytest.raises(ValueError, match="first"), Workers(2) as workers:
            workers(partial(fail, "first", second_has_failed.wait))
            workers(partial(fail, "second", last))

    def test_it_goes_before_an_error_of_the_block(self) -> None:
        def fail() -> None:
            raise ValueError("of a task")

        with pytest.raises(ValueError, match="of a task"), Workers(1) as workers:
            workers(fail)
            raise KeyError("of the block")

    def test_many_tasks_after_a_failure_neither_run_nor_hang(self) -> None:
        ran: list[int] = []

        def task(number: int) -> None:
            ran.append(number)
            if number == 3:
                raise ValueError("three")

        with pytest.raises(ValueError, match="three"), Workers(1) as workers:
            for number in range(1000):
                workers(partial(task, number))
        assert ran == [0, 1, 2, 3]

    def test_few_tasks_wait(self) -> None:
        go = threading.Event()
        given = 0

        def give() -> None:
            nonlocal given
            with Workers(2) as workers:
                for _ in range(100):
                    workers(lambda: go.wait() and None)
                    given += 1

        thread = threading.Thread(target=give)
        thread.start()
        thread.join(0.2)
        waiting = given
        go.set()
        thread.join(10)
        assert waiting == 10 and given == 100
