"""INA219 and INA226 through the real /dev/i2c of a real kernel: its i2c-stub driver has the registers, our sensor does the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fixtures import i2c_machine

pytestmark = pytest.mark.timeout(900)
AGENT = Path(__file__).resolve().parents[2] / "agent"
SCRIPT = r"""
import glob, json, time
from smbus2 import SMBus
from joulemark_agent.sensors import NotPresent, Options, ina2xx
from joulemark_agent.sysfs import Roots

number = next(int(path.rsplit("-", 1)[1]) for path in glob.glob("/sys/bus/i2c/devices/i2c-*") if "stub" in open(path + "/name").read())
bus = SMBus(number)

def put(address, register, value):
    bus.write_word_data(address, register, (value & 0xFF) << 8 | value >> 8)

def get(address, register):
    word = bus.read_word_data(address, register)
    return (word & 0xFF) << 8 | word >> 8

def sensor(**settings):
    return ina2xx.probe(Roots(), Options(settings={"bus": number, "shunt_ohm": 0.01, **settings}))

def refused(**settings):
    try:
        sensor(**settings).close()
    except NotPresent as reason:
        return str(reason)

found = {}
for register, value in ((0xFE, 0x5449), (0xFF, 0x2260), (0x00, 0x4127), (0x02, 4032), (0x01, 5000)):  # 5.04 V, 12.5 mV
    put(0x40, register, value)
ina226 = sensor(chip="ina226")
found["ina226_w"] = ina226.read()[0]
found["ina226_setting"] = get(0x40, 0x00)
started = time.perf_counter()
for _ in range(200):
    ina226.read()
found["read_s"] = (time.perf_counter() - started) / 200
ina226.close()
found["ina226_put_back"] = get(0x40, 0x00)
for register, value in ((0x00, 0x399F), (0x02, 1260 << 3 | 2), (0x01, 0x10000 - 125)):  # 5.04 V, -1.25 mV
    put(0x41, register, value)
ina219 = sensor(chip="ina219", address=0x41)
found["ina219_w"] = ina219.read()[0]
ina219.close()
found["no_chip"] = refused(chip="ina226", address=0x45)
found["other_chip"] = refused(chip="ina226", address=0x41)
print("FOUND " + json.dumps(found), flush=True)
"""


def test_ina_chips_on_a_real_bus(tmp_path: Path) -> None:
    i2c_machine.require()
    machine = i2c_machine.make(tmp_path, ("pydantic", "smbus2"), (AGENT / "joulemark", AGENT / "joulemark_agent"))
    said = i2c_machine.run(machine, SCRIPT)
    # The firmware's escape sequences may stand before it on the same line.
    lines = [line.partition("FOUND ")[2] for line in said.splitlines() if "FOUND " in line]
    assert lines, said[-3000:]
    found = json.loads(lines[0])
    assert found["ina226_w"] == pytest.approx(5.04 * 1.25)
    assert found["ina219_w"] == pytest.approx(-5.04 * 0.125)
    assert (found["ina226_setting"], found["ina226_put_back"]) == (0x456F, 0x4127)
    assert "nothing answers at 0x45" in found["no_chip"]
    assert "is no INA226" in found["other_chip"]
    assert 0 < found["read_s"] < 0.05, "two words of SMBus, emulated"
