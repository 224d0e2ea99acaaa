"""Meters on a wire: an I²C chip made of registers, a wall socket's real HTTP server, an SCPI instrument on TCP and on a terminal line,
jetson-stats in its own process."""

from __future__ import annotations

import errno
import http.server
import json
import os
import pty
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from joulemark.errors import BadInput
from joulemark_agent.sensors import NotPresent, Options, Sensor, ina2xx, jetson_stats, wall_http, wall_scpi
from joulemark_agent.sysfs import Roots
from tests.fixtures import trees
from tests.joulemark_agent.test_boards import readings


# --- INA219, INA226 ---------------------------------------------------------------------------------------------------
class Chip:
    """An SMBus with one chip: words are stored as the wire has them, big-endian, and read as SMBus gives them."""

    def __init__(self, **registers: int) -> None:
        self.registers = {int(name[1:], 16): value for name, value in registers.items()}
        self.writes: list[tuple[int, int]] = []
        self.fails: int | None = None
        self.closed = 0

    def read_word_data(self, i2c_addr: int, register: int) -> int:
        self._answer(i2c_addr)
        value = self.registers.get(register, 0)
        return (value & 0xFF) << 8 | value >> 8

    def write_word_data(self, i2c_addr: int, register: int, value: int) -> None:
        self._answer(i2c_addr)
        self.registers[register] = (value & 0xFF) << 8 | value >> 8
        self.writes.append((register, self.registers[register]))

    def _answer(self, address: int) -> None:
        if self.fails is not None:
            raise OSError(self.fails, os.strerror(self.fails))
        if address != 0x40:
            raise OSError(errno.EREMOTEIO, "nobody there")

    def close(self) -> None:
        self.closed += 1


INA226 = {"xFE": 0x5449, "xFF": 0x2260, "x00": 0x4127, "x02": 4032, "x01": 5000}  # 5.04 V, 12.5 mV
INA219 = {"x00": 0x399F, "x02": 1260 << 3 | 2, "x01": 1250}  # 5.04 V, conversion ready; 12.5 mV


def meter(monkeypatch: pytest.MonkeyPatch, bus: Chip, **settings: Any) -> Sensor:
    monkeypatch.setattr(ina2xx, "_open_bus", lambda _: bus)
    return ina2xx.probe(Roots(), Options(settings={"shunt_ohm": 0.01, **settings}))


@pytest.mark.parametrize(("kind", "registers"), [("ina226", INA226), ("ina219", INA219)])
def test_ina_power_in_watts_and_its_setting_is_put_back(
    kind: str, registers: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = Chip(**registers)
    sensor = meter(monkeypatch, chip, chip=kind)
    assert sensor.read() == (pytest.approx(5.04 * 1.25),)
    assert sensor.channels[0].meaning == "supply"
    assert sensor.channels[0].total
    assert chip.registers[0] == {"ina226": 0x456F, "ina219": 0x3FFF}[kind]
    sensor.close()
    sensor.close()
    assert chip.registers[0] == registers["x00"]
    assert chip.closed == 1


def test_ina_a_little_may_flow_back_and_a_board_does_not_feed_its_supply(monkeypatch: pytest.MonkeyPatch) -> None:
    sensor = meter(monkeypatch, Chip(**{**INA226, "x01": 0x10000 - 500}), chip="ina226")
    assert sensor.read() == (pytest.approx(-5.04 * 0.125),)
    sensor = meter(monkeypatch, Chip(**{**INA226, "x01": 0x10000 - 5000}), chip="ina226")
    assert sensor.read() == (None,)
    assert "exchange IN+ and IN-" in sensor.notes()["ina2xx.power"]


@pytest.mark.parametrize(
    ("kind", "registers", "full"), [("ina226", INA226, 0x7FFF), ("ina219", INA219, 32000), ("ina219", INA219, 0x8300)]
)
def test_ina_at_the_end_of_its_range_is_no_reading(
    kind: str, registers: dict[str, int], full: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensor = meter(monkeypatch, Chip(**{**registers, "x01": full}), chip=kind)
    assert sensor.read() == (None,)
    assert "smaller shunt" in sensor.notes()["ina2xx.power"]


def test_ina_that_is_pulled_off_and_put_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip(**INA226)
    sensor = meter(monkeypatch, chip, chip="ina226")
    chip.fails = errno.EREMOTEIO
    assert sensor.read() == (None,)
    chip.fails = None
    assert sensor.read() == (pytest.approx(6.3),)
    assert "1 reads failed, the last with EREMOTEIO" in sensor.notes()["ina2xx.power"]


def test_ina_something_else_at_the_address_is_refused_before_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = Chip(**{**INA226, "xFF": 0x2270})
    with pytest.raises(NotPresent, match="no INA226"):
        meter(monkeypatch, chip, chip="ina226")
    assert chip.writes == []
    assert chip.closed == 1


@pytest.mark.parametrize(
    ("settings", "fails", "word"),
    [
        ({"chip": "ina226", "address": 0x41}, None, "nothing answers at 0x41"),
        ({"chip": "ina226"}, errno.EBUSY, "driver of the kernel"),
        ({"chip": "ina226"}, errno.ENODEV, "ENODEV"),
    ],
)
def test_ina_that_cannot_be_had(
    settings: dict[str, Any], fails: int | None, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chip = Chip(**INA226)
    chip.fails = fails
    with pytest.raises(NotPresent, match=word) as caught:
        meter(monkeypatch, chip, **settings)
    assert caught.value.hint
    assert chip.closed == 1


@pytest.mark.parametrize(
    "settings", [{"chip": "ina260"}, {"chip": "ina226", "shunt_ohm": 0}, {"chip": "ina226", "address": 3}, {"x": 1}]
)
def test_ina_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="ina2xx"):
        ina2xx.probe(Roots(), Options(settings={"shunt_ohm": 0.1, **settings}))


def test_ina_without_the_bus_says_how_to_turn_it_on() -> None:
    with pytest.raises(NotPresent, match=r"i2c-250 is not there") as caught:
        ina2xx.probe(Roots(), Options(settings={"chip": "ina226", "shunt_ohm": 0.1, "bus": 250}))
    assert "raspi-config" in caught.value.hint


# --- a wall socket ----------------------------------------------------------------------------------------------------
class Socket(http.server.BaseHTTPRequestHandler):
    """What Shelly and Tasmota sockets answer, and worse."""

    power_w: ClassVar[float | str] = 7.5
    delay_s: ClassVar[float] = 0.0

    def do_GET(self) -> None:
        time.sleep(self.delay_s)
        bodies: dict[str, Any] = {
            "/rpc/Switch.GetStatus?id=0": {"id": 0, "apower": self.power_w, "voltage": 230.3, "aenergy": {"total": 18}},
            "/meter/0": {"power": self.power_w, "is_valid": True, "total": 1234},
            "/cm?cmnd=Status%208": {"StatusSNS": {"ENERGY": {"Power": self.power_w, "Total": 1.5}}},
            "/list": {"phases": [{"w": 1.0}, {"w": self.power_w}]},
        }
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/meter/0")
            self.end_headers()
            return
        body = json.dumps(bodies.get(self.path, {})).encode()
        if self.path == "/endless":
            body = b" " * 200_000
        if self.path == "/deep":
            body = b"[" * 50_000
        self.send_response(404 if self.path == "/none" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@contextmanager
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Socket, "power_w", 7.5)
    monkeypatch.setattr(Socket, "delay_s", 0.0)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Socket) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        ("/rpc/Switch.GetStatus?id=0", {"kind": "shelly"}),
        ("/meter/0", {"kind": "shelly1"}),
        ("/cm?cmnd=Status%208", {"kind": "tasmota"}),
        ("/list", {"power": "/phases/1/w"}),
    ],
)
def test_wall_socket_power(path: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch) as address:
        sensor = wall_http.probe(Roots(), Options(settings={"url": address + path, "interval_s": 0.1, **settings}))
        channel = sensor.channels[0]
        assert (channel.quantity, channel.unit, channel.meaning, channel.total) == ("power", "W", "wall", True)
        assert readings(sensor) == {"wall.power": 7.5}
        monkeypatch.setattr(Socket, "power_w", 9.25)
        deadline = time.monotonic() + 5
        while readings(sensor) != {"wall.power": 9.25}:
            assert time.monotonic() < deadline
        sensor.close()


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("/none", "HTTP status 404"),
        ("/redirect", "HTTP status 302"),
        ("/endless", "more than 65536 bytes"),
        ("/deep", "failed"),
        ("/empty", "not a number"),
    ],
)
def test_wall_socket_that_answers_badly_is_absent(path: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch) as address, pytest.raises(NotPresent, match=word):
        wall_http.probe(Roots(), Options(settings={"url": address + path, "kind": "shelly1"}))


@pytest.mark.parametrize("power", ["7.5", True, None, 1e9, -50.0])
def test_wall_socket_implausible_or_no_number_is_no_reading(power: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch) as address:
        monkeypatch.setattr(Socket, "power_w", power)
        with pytest.raises(NotPresent):
            wall_http.probe(Roots(), Options(settings={"url": address + "/meter/0", "kind": "shelly1"}))


def test_wall_socket_that_becomes_slow_and_goes_leaves_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(monkeypatch) as address:
        settings = {"url": address + "/meter/0", "kind": "shelly1", "interval_s": 0.1, "timeout_s": 0.2}
        sensor = wall_http.probe(Roots(), Options(settings=settings))
        readings(sensor)
        monkeypatch.setattr(Socket, "delay_s", 0.5)
        time.sleep(1.0)
        sensor.read()
        time.sleep(0.5)
        assert sensor.read() == (None,)
        assert "no answer in time" in sensor.notes()["wall.power"]
    time.sleep(0.5)
    assert sensor.read() == (None,)
    sensor.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "ftp://x", "kind": "shelly"},
        {"url": "http://x"},
        {"url": "http://x", "kind": "shelly", "power": "/a"},
        {"url": "http://x", "kind": "fritz"},
        {"url": "http://x", "power": "a"},
    ],
)
def test_wall_socket_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="wall_http"):
        wall_http.probe(Roots(), Options(settings=settings))


# --- SCPI -------------------------------------------------------------------------------------------------------------
class Instrument(socketserver.StreamRequestHandler):
    """Answers a query with what the test put there."""

    answer: ClassVar[bytes] = b"+6.250E+00\n"
    heard: ClassVar[list[bytes]] = []

    def handle(self) -> None:
        for line in self.rfile:
            type(self).heard.append(line)
            self.wfile.write(self.answer)


@contextmanager
def instrument(monkeypatch: pytest.MonkeyPatch, answer: bytes = b"+6.250E+00\n") -> Iterator[str]:
    monkeypatch.setattr(Instrument, "answer", answer)
    monkeypatch.setattr(Instrument, "heard", [])
    socketserver.ThreadingTCPServer.allow_reuse_address = True
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Instrument) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"socket://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_scpi_over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    with instrument(monkeypatch) as port:
        settings = {"port": port, "query": ":NUM:NORM:VAL? 3", "interval_s": 0.05}
        sensor = wall_scpi.probe(Roots(), Options(settings=settings))
        assert readings(sensor) == {"meter.power": 6.25}
        assert (sensor.channels[0].meaning, sensor.channels[0].total) == ("wall", True)
        assert Instrument.heard[0] == b":NUM:NORM:VAL? 3\n"
        monkeypatch.setattr(Instrument, "answer", b"9.91E37\n")
        deadline = time.monotonic() + 5
        while "over range" not in sensor.notes().get("meter.power", ""):
            assert time.monotonic() < deadline
            sensor.read()
            time.sleep(0.02)
        monkeypatch.setattr(Instrument, "answer", b"5.5,0.1,230\n")
        while sensor.read() != (5.5,):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        sensor.close()


def test_scpi_on_a_serial_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal pair stands for /dev/ttyUSB0: the same driver, real termios settings."""
    ours, theirs = pty.openpty()
    port = os.ttyname(theirs)

    def answer() -> None:
        heard = b""
        while not heard.endswith(b"stop"):
            try:
                heard += os.read(ours, 256)
            except OSError:
                return
            if heard.endswith(b"?\n"):
                os.write(ours, b"4.75\n")
                heard = b""

    threading.Thread(target=answer, daemon=True).start()
    sensor = wall_scpi.probe(Roots(), Options(settings={"port": port, "baud": 115200, "interval_s": 0.05}))
    assert readings(sensor) == {"meter.power": 4.75}
    sensor.close()
    os.close(theirs)
    os.close(ours)


@pytest.mark.parametrize(
    ("answer", "word"),
    [(b"", "no answer in time"), (b"ERR\n", "not a number"), (b"nan\n", "not a number"), (b"1e30\n", "implausible")],
)
def test_scpi_that_answers_badly_is_absent(answer: bytes, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with instrument(monkeypatch, answer) as port, pytest.raises(NotPresent, match=word):
        wall_scpi.probe(Roots(), Options(settings={"port": port, "timeout_s": 0.2}))


def test_scpi_port_that_is_not_there_and_settings() -> None:
    with pytest.raises(NotPresent, match="cannot be opened") as caught:
        wall_scpi.probe(Roots(), Options(settings={"port": "/dev/ttyUSB99"}))
    assert "dialout" in caught.value.hint
    for settings in (
        {"port": "spy:///dev/tty"},
        {"port": "/dev/../etc/shadow"[:0]},
        {"port": "/dev/x", "query": "a\nb"},
    ):
        with pytest.raises(BadInput, match="wall_scpi"):
            wall_scpi.probe(Roots(), Options(settings=settings))


# --- jetson-stats -----------------------------------------------------------------------------------------------------
JTOP = """
import os, time
class JtopException(Exception): pass
class jtop:
    def __init__(self, interval): self.interval = interval
    def __enter__(self):
        if os.environ.get("JTOP_REFUSES"): raise JtopException("The jtop.service is not active")
        return self
    def __exit__(self, *_): pass
    def ok(self): time.sleep(self.interval); return True
    @property
    def power(self):
        return {"rail": {"VDD_IN": {"volt": 5000, "curr": 900, "power": 4500, "avg": 4400},
                         "VDD_SOC": {"volt": 5000, "curr": 200, "power": 1000, "avg": 990}},
                "tot": {"volt": 5000, "curr": 900, "power": 4500, "avg": 4400, "name": "VDD_IN"}}
"""


def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    """jetson-stats' place taken by a module of the same name; the process, its lines and its end are real."""
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub" / "jtop.py").write_text(JTOP)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stub"), os.environ.get("PYTHONPATH", "")]))
    return trees.board("jetson-orin-nano-jetpack6", tmp_path / "board")


def test_jetson_stats_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sensor = jetson_stats.probe(stub(tmp_path, monkeypatch), Options(settings={"interval_s": 0.1, "total": True}))
    assert {channel.name: channel.total for channel in sensor.channels} == {
        "jetson_stats.VDD_IN": False,
        "jetson_stats.VDD_SOC": False,
        "jetson_stats.total": True,
    }
    assert readings(sensor)["jetson_stats.total"] == 4.5
    assert "jtop" not in sys.modules, "it is AGPL and stays out of this process"
    (child,) = [child for child in psutil.Process().children() if "_jtop_process" in " ".join(child.cmdline())]
    sensor.close()
    sensor.close()
    assert not child.is_running()


def test_jetson_stats_without_its_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = stub(tmp_path, monkeypatch)
    monkeypatch.setenv("JTOP_REFUSES", "1")
    with pytest.raises(NotPresent, match=r"jtop.service is not active") as caught:
        jetson_stats.probe(roots, Options())
    assert "AGPL" in caught.value.hint


def test_jetson_stats_is_not_started_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(NotPresent, match="no Jetson"):
        jetson_stats.probe(trees.board("raspberry-pi-5-bookworm", tmp_path), Options())
    with pytest.raises(BadInput, match="jetson_stats"):
        jetson_stats.probe(Roots(), Options(settings={"interval_s": 0}))
