import io
import re

import pytest

from dpo.progress import Console


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and can tell what stands on it."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines = self.getvalue().split("\n")
        return [re.sub(r"\x1b\[\d+m", "", line.rsplit("\r\x1b[K", 1)[-1]) for line in lines]


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def ordinary_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@pytest.fixture
def terminal() -> Terminal:
    return Terminal()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_bar_shows_share_count_times_rate_and_status(terminal: Terminal, clock: Clock) -> None:
    with Console(terminal, clock=clock).bar("train", 8, unit="steps") as bar:
        clock.seconds = 4.0
        bar.update(2, status="loss 0.61")
        shown = terminal.screen()
    # 2 of 8 steps in 4 s: half a step a second, 6 more steps take 12 s
    bar_cells = "█" * 5 + "░" * 15
    assert shown == [f"train  25% |{bar_cells}| 2/8 [00:04<00:12, 0.5 steps/s] loss 0.61"]


def test_unknown_total_shows_count_and_rate(terminal: Terminal, clock: Clock) -> None:
    with Console(terminal, clock=clock).bar("read", unit="rows") as bar:
        clock.seconds = 2.0
        bar.advance(10)
        assert terminal.screen() == ["read 10 [00:02, 5 rows/s]"]


def test_large_rate_is_written_out(terminal: Terminal, clock: Clock) -> None:
    with Console(terminal, clock=clock).bar("tokenize", unit="pairs") as bar:
        clock.seconds = 2.0
        bar.update(24_690)
    assert terminal.screen()[0] == "tokenize 24690 [00:02, 12,345 pairs/s]"


def test_resumed_bar_does_not_count_old_units_in_its_rate(terminal: Terminal, clock: Clock) -> None:
    with Console(terminal, clock=clock).bar("train", 200, unit="steps", start=100) as bar:
        clock.seconds = 10.0
        bar.update(110)
        assert "[00:10<01:30, 1 steps/s]" in terminal.screen()[0]


def test_terminal_is_drawn_at_most_ten_times_a_second(terminal: Terminal, clock: Clock) -> None:
    with Console(terminal, clock=clock).bar("train", 1000) as bar:
        for step in range(1000):
            clock.seconds = step / 1000
            bar.update(step)
        assert terminal.getvalue().count("\r") <= 11


def test_final_state_stays_on_the_screen(terminal: Terminal, clock: Clock) -> None:
    with Console(terminal, clock=clock).bar("train", 3) as bar:
        for _ in range(3):
            bar.advance()
    assert "100%" in terminal.screen()[0]
    assert terminal.screen()[1:] == [""]


def test_lines_are_written_above_the_bar(terminal: Terminal, clock: Clock) -> None:
    console = Console(terminal, clock=clock)
    with console.bar("train", 3):
        console.say("saved step 1")
        first, second = terminal.screen()
    assert first == "saved step 1"
    assert second.startswith("train   0%")


def test_inner_bar_covers_the_outer_one_and_then_goes(terminal: Terminal, clock: Clock) -> None:
    console = Console(terminal, clock=clock)
    with console.bar("train", 3) as train:
        with console.bar("evaluate", 5):
            assert terminal.screen()[-1].startswith("evaluate")
            clock.seconds = 1.0
            train.update(1)
            assert terminal.screen()[-1].startswith("evaluate")
        assert terminal.screen() == [terminal.screen()[0]]
        assert terminal.screen()[0].startswith("train")


def test_error_starts_on_its_own_line(terminal: Terminal, clock: Clock) -> None:
    with pytest.raises(RuntimeError), Console(terminal, clock=clock).bar("train", 3):
        raise RuntimeError
    assert terminal.getvalue().endswith("\n")


def test_line_fits_the_terminal(terminal: Terminal, clock: Clock) -> None:
    with Console(terminal, clock=clock).bar("train", 3) as bar:
        clock.seconds = 1.0
        bar.update(1, status="x" * 200)
        assert len(terminal.screen()[0]) == 79


def test_no_color_is_honoured(
    terminal: Terminal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Console(terminal, clock=clock).bar("train", 3):
        assert "\x1b[36m" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    with Console(plain, clock=clock).bar("train", 3):
        assert "\x1b[36m" not in plain.getvalue()


def test_file_gets_occasional_plain_lines(clock: Clock) -> None:
    stream = io.StringIO()
    with Console(stream, clock=clock).bar("train", 100, unit="steps") as bar:
        for step in range(1, 101):
            clock.seconds = step / 4
            bar.update(step)
    assert stream.getvalue().splitlines() == [
        "train  40% 40/100 [00:10<00:15, 4 steps/s]",
        "train  80% 80/100 [00:20<00:05, 4 steps/s]",
        "train 100% 100/100 [00:25, 4 steps/s]",
    ]


def test_file_gets_the_end_of_a_bar_once(clock: Clock) -> None:
    stream = io.StringIO()
    with Console(stream, clock=clock).bar("train", 2) as bar:
        clock.seconds = 10.0
        bar.update(2)
    assert stream.getvalue().count("\n") == 1


def test_file_gets_no_end_of_a_bar_that_ends_with_an_error(clock: Clock) -> None:
    file = io.StringIO()
    rows = (1 // row for row in (1, 0))
    with pytest.raises(ZeroDivisionError), Console(file, clock=clock).bar("read") as bar:
        list(bar.each(rows))
    assert file.getvalue() == ""


def test_file_gets_a_bar_inside_another_only_if_it_is_long(clock: Clock) -> None:
    stream = io.StringIO()
    console = Console(stream, clock=clock)
    with console.bar("train", 2):
        with console.bar("evaluate", 5) as short:
            short.update(5)
        assert stream.getvalue() == ""
        with console.bar("evaluate", 5) as long:
            clock.seconds = 11.0
            long.update(3)
            long.update(5)
    assert [line.split(" [")[0] for line in stream.getvalue().splitlines()] == [
        "evaluate  60% 3/5", "evaluate 100% 5/5", "train   0% 0/2",
    ]  # fmt: skip


def test_console_knows_what_it_was_told_even_if_it_is_quiet(terminal: Terminal) -> None:
    console = Console(terminal, quiet=True)
    console.say("a note")
    console.warn("a warning")
    assert console.told == ["a note", "a warning"]


def test_dumb_terminal_gets_plain_lines(
    terminal: Terminal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = Console(terminal, clock=clock)
    with console.bar("train", 3):
        console.say("note")
    assert "\x1b" not in terminal.getvalue()
    assert "\r" not in terminal.getvalue()


def test_quiet_console_shows_warnings_only(terminal: Terminal, clock: Clock) -> None:
    console = Console(terminal, quiet=True, clock=clock)
    with console.bar("train", 3) as bar:
        clock.seconds = 1.0
        bar.advance()
        console.say("saved")
        console.warn("a damaged checkpoint was left out")
    assert terminal.getvalue() == "a damaged checkpoint was left out\n"


def test_stream_without_unicode_gets_ascii(clock: Clock) -> None:
    class AsciiTerminal(Terminal):
        encoding = "ascii"

    terminal = AsciiTerminal()
    with Console(terminal, clock=clock).bar("train", 4) as bar:
        clock.seconds = 1.0
        bar.update(1)
        assert terminal.getvalue().isascii()


def test_console_whose_stream_cannot_be_written_to_is_silent() -> None:
    class Gone(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(5, "Input/output error")

    console = Console(Gone())
    with console.bar("work", 2) as bar:
        bar.update(1)
        console.warn("nobody hears it")


def test_each_counts_an_item_when_the_next_is_asked_for(clock: Clock) -> None:
    with Console(io.StringIO(), clock=clock).bar("read", 3) as bar:
        assert [(item, bar.done) for item in bar.each("abc")] == [("a", 0), ("b", 1), ("c", 2)]
        assert bar.done == 3
