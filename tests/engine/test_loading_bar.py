import io
import sys

import pytest

from fewbits.commands import progress


class Terminal(io.StringIO):
    def __init__(self, someone_looks: bool) -> None:
        super().__init__()
        self.someone_looks = someone_looks

    def isatty(self) -> bool:
        return self.someone_looks


@pytest.mark.parametrize(("terminal", "patience", "shown"), [(True, 0, True), (True, 1000, False), (False, 0, False)])
def test_the_bar_shows_where_loading_takes_long_and_someone_looks(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, patience: float, shown: bool
) -> None:
    stderr = Terminal(terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    with progress.LoadingBar("loading", patience) as bar:
        bar(1, 4)
        bar(4, 4)
    assert ("loading" in stderr.getvalue()) == shown
