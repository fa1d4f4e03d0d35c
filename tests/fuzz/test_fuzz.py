"""Folders changed at random may be refused or run; never hang, never fail otherwise, never forget a tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
from check import planned, run, total
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limits import limited
from mutate import made_up, mutated, sound

MEGABYTES, SECONDS = 400, 60


class Drawn:
    """Choices that hypothesis makes, and makes simpler once something fails."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def below(self, count: int) -> int:
        return self._data.draw(st.integers(0, count - 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def many(examples: int) -> settings:
    return settings(max_examples=examples, suppress_health_check=list(HealthCheck))


def test_the_sound_folder_runs(folder: Path) -> None:
    plan = planned(sound().write(folder))
    assert plan is not None and plan.errors == [] and plan.kv_cache is not None
    assert len({str(row.spec) for row in plan.rows if row.kind in ("linear", "head")}) == 8
    assert run(folder)


@pytest.mark.parametrize("kind", ["config", "words", "data", "file"])
def test_changed_in_one_way(kind: str, folder: Path) -> None:
    @many(100)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        made = mutated(Drawn(data), [kind])
        with limited(SECONDS, MEGABYTES):
            run(made.write(folder))

    check()


def test_changed_in_every_way(folder: Path) -> None:
    @many(100)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        made = mutated(Drawn(data), ["config", "words", "data"])
        with limited(SECONDS, MEGABYTES):
            run(made.write(folder))

    check()


def test_any_valid_header_is_planned_whole(folder: Path) -> None:
    @many(150)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        made = made_up(Drawn(data))
        with limited(SECONDS, MEGABYTES):
            plan = planned(made.write(folder))
        assert plan is not None, "a valid header, refused"
        total(plan)
        assert plan.checkpoint is not None and plan.checkpoint.tensors.keys() == made.tensors.keys()

    check()
