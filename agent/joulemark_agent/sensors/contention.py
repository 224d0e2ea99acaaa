"""Who else uses this machine: processor time of others and of the hypervisor, pressure stalls, and the load average.

Owns: the contention channels. Shares lie between 0 and 1 and are of the whole machine's processor capacity over the
time since the last reading, at most two a second, so that the first reading has none. Not aware of what is too much.
Truth: Documentation/filesystems/proc.rst (/proc/stat, /proc/PID/stat, in clock ticks) and
Documentation/accounting/psi.rst (the `total=` microseconds; the kernel's own averages over 10 s and more are too slow).

The two counts behind `contention.other_cpu` disagree by a clock tick now and then: /proc/stat charges a whole tick to
whoever runs when it ends, a process's times are exact. A reading that would come out negative counts as 0 and the rest
is taken off the next ones, so that the mean over many is right.
`contention.psi_cpu` includes waiting that the worker causes itself, when it has more threads than cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from joulemark.wire import Channel
from joulemark_agent.sensors import NotPresent, Options, Pace, Sensor, Values
from joulemark_agent.sysfs import KeptFile, Roots, Unreadable, read_text

_CPU_SHARES = {
    "contention.steal": "/proc/stat: steal ÷ all",
    "contention.busy": "/proc/stat: user, nice, system, interrupts ÷ all",
    "contention.other_cpu": "/proc/stat busy, less worker and agent (/proc/PID/stat) ÷ all",
}
_INTERVAL_S = 0.5
"""A clock tick is 1/50 of a core over this time. Over a sampler's tick it would be 1/10: coarser than what disturbs."""
_PRESSURES = ("cpu", "memory", "io")


_MOST_DIGITS = 20
"""The kernel counts in 64 bits."""


@dataclass(frozen=True)
class Ticks:
    """Clock ticks of the whole machine since boot: doing work, taken by the hypervisor, and all together."""

    busy: int
    steal: int
    total: int


def parse_stat(content: bytes) -> Ticks | None:
    """/proc/stat, line 1: user nice system idle iowait irq softirq steal; guest time is inside user and nice."""
    words = content[: content.find(b"\n")].split()
    if len(words) < 5 or words[0] != b"cpu" or not all(map(_is_count, words[1:])):
        return None
    counts = [int(word) for word in words[1:9]] + [0] * (9 - len(words))
    user, nice, system, idle, iowait, irq, softirq, steal = counts
    busy = user + nice + system + irq + softirq
    return Ticks(busy, steal, busy + steal + idle + iowait)


def parse_process_ticks(content: bytes) -> int | None:
    """utime + stime of /proc/PID/stat; the command's name before them may hold spaces and brackets."""
    words = content[content.rfind(b")") + 1 :].split()
    if len(words) < 13 or not (_is_count(words[11]) and _is_count(words[12])):
        return None
    return int(words[11]) + int(words[12])


def parse_pressure_us(content: bytes) -> int | None:
    """Microseconds in which some task waited, of a /proc/pressure file."""
    line = content[: content.find(b"\n")] if b"\n" in content else content
    value = line.rpartition(b"total=")[2]
    return int(value) if line.startswith(b"some") and _is_count(value) else None


def _is_count(word: bytes) -> bool:
    return word.isdigit() and len(word) <= _MOST_DIGITS


class CpuShares:
    """Turns successive counts into shares of the machine's capacity."""

    def __init__(self) -> None:
        self._previous: tuple[Ticks, int | None] | None = None
        self._carried = 0

    def update(self, now: Ticks, own: int | None) -> tuple[float | None, float | None, float | None]:
        """Steal, busy and others' share since the last call. `own` is None when a watched process cannot be read."""
        previous, self._previous = self._previous, (now, own)
        if previous is None or now.total <= previous[0].total:
            return None, None, None
        before, own_before = previous
        total = now.total - before.total
        busy = max(0, now.busy - before.busy)
        steal = max(0, now.steal - before.steal)
        return steal / total, busy / total, self._others(busy, own, own_before, total)

    def _others(self, busy: int, own: int | None, own_before: int | None, total: int) -> float | None:
        if own is None or own_before is None:
            return None
        rest = busy - (own - own_before) + self._carried
        self._carried = min(0, rest)
        return min(1.0, max(0, rest) / total)


class _Contention:
    def __init__(self, roots: Roots, options: Options) -> None:
        self._clock = options.clock
        self._stat = KeptFile(roots.proc / "stat")
        watched = {options.agent_pid} | ({options.worker_pid} if options.worker_pid is not None else set())
        self._processes = [KeptFile(roots.proc / str(pid) / "stat") for pid in sorted(watched)]
        self._shares = CpuShares()
        self._load = KeptFile(roots.proc / "loadavg")
        self._pace = Pace(options.clock, _INTERVAL_S)
        self._missing: dict[str, str] = {}
        self._pressures: list[KeptFile] = []
        self._before: list[tuple[float, int] | None] = []
        for name in _PRESSURES:
            self._offer_pressure(roots, name)
        self.channels = self._channels()

    def _offer_pressure(self, roots: Roots, name: str) -> None:
        path = roots.proc / "pressure" / name
        text = read_text(path)
        if isinstance(text, Unreadable):
            self._missing[f"contention.psi_{name}"] = (
                f"no pressure stall information: {text}; Linux has it since 4.20, with psi=1"
            )
        else:
            self._pressures.append(KeptFile(path))
            self._before.append(None)

    def _channels(self) -> tuple[Channel, ...]:
        shares = [Channel(name=n, quantity="share", unit="1", source=source) for n, source in _CPU_SHARES.items()]
        pressures = [
            Channel(
                name=f"contention.psi_{file.path.name}",
                quantity="share",
                unit="1",
                source=f"/proc/pressure/{file.path.name}: some, total",
            )
            for file in self._pressures
        ]
        load = Channel(name="contention.load1", quantity="count", unit="1", source="/proc/loadavg, 1 minute")
        return (*shares, *pressures, load)

    def _own_ticks(self) -> int | None:
        total = 0
        for file in self._processes:
            content = file.read()
            ticks = None if isinstance(content, Unreadable) else parse_process_ticks(content)
            if ticks is None:
                return None
            total += ticks
        return total

    def _pressure(self, index: int) -> float | None:
        content = self._pressures[index].read()
        now_s = self._clock()
        waited_us = None if isinstance(content, Unreadable) else parse_pressure_us(content)
        before = self._before[index]
        self._before[index] = None if waited_us is None else (now_s, waited_us)
        if before is None or waited_us is None or now_s <= before[0]:
            return None
        return min(1.0, max(0, waited_us - before[1]) / 1e6 / (now_s - before[0]))

    def _load1(self) -> float | None:
        content = self._load.read()
        if isinstance(content, Unreadable):
            return None
        first = content.split(maxsplit=1)[0]
        return float(first) if first.replace(b".", b"", 1).isdigit() else None

    def read(self) -> Values:
        return self._pace.read(self._read_now) or (None,) * len(self.channels)

    def _read_now(self) -> Values:
        content = self._stat.read()
        ticks = None if isinstance(content, Unreadable) else parse_stat(content)
        own = self._own_ticks()
        shares = self._shares.update(ticks, own) if ticks else (None, None, None)
        return (
            *shares,
            *(self._pressure(index) for index in range(len(self._pressures))),
            self._load1(),
        )

    def _files(self) -> list[KeptFile]:
        return [self._stat, *self._processes, *self._pressures, self._load]

    def notes(self) -> dict[str, str]:
        failed = {f"contention ({f.path.name})": why for f in self._files() if (why := f.explanation())}
        return {**self._missing, **failed}

    def close(self) -> None:
        for file in self._files():
            file.close()


def probe(roots: Roots, options: Options) -> Sensor:
    """Always there on Linux. Raises NotPresent when /proc/stat cannot be read."""
    text = read_text(roots.proc / "stat")
    if isinstance(text, Unreadable):
        raise NotPresent(str(text), "mount /proc")
    return _Contention(roots, options)
