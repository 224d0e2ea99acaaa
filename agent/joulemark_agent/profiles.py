"""Device profiles: one TOML a board, chosen by what the machine says about itself; and the facts of this device.

Owns: the profiles' format, the rules of matching, the choice. Not aware of how a sensor or an engine works.

Every rule of a profile's [match] must hold: `arch` (uname -m), `dt_compatible` (a string of the device tree),
`dmi_product` (the product name that the firmware gives, whole and without regard to case), `sys_path` (all of these
exist below /sys). A profile without rules fits every machine. Of those that fit the most specific is taken: a
device-tree match before a product match before paths before an architecture; of two device-tree matches the one that
the board names first, for boards list the exact model before the family. Two equally specific profiles are a fault of
the profiles.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from joulemark import __version__, plugins
from joulemark.errors import BadInput, NotFound
from joulemark.wire import Absent, Channel, DeviceFacts, Identifier, Metric, Title
from joulemark_agent import machine, tuning
from joulemark_agent.sensors import SensorUse
from joulemark_agent.sysfs import Roots

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]  # installed on Python 3.10 only

_MAX_PROFILE_BYTES = 16 * 1024  # the time that dotted keys take to read grows with the square of their parts
_HERE = Path(__file__).resolve().parent
Relative = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._:@-]*(/[A-Za-z0-9_][A-Za-z0-9._:@-]*)*$")]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MatchRules(_Table):
    """What must hold for a profile to fit; an empty rule always holds."""

    arch: tuple[str, ...] = ()
    dt_compatible: tuple[str, ...] = ()
    dmi_product: tuple[str, ...] = ()
    sys_path: tuple[Relative, ...] = ()


class Limits(_Table):
    """What the maker allows: above it a run is suspect. None: not stated."""

    temperature_c: Annotated[float, Field(gt=0, lt=200)] | None = None
    power_w: Annotated[float, Field(gt=0)] | None = None
    start_temperature_c: Annotated[float, Field(gt=0, lt=200)] | None = None
    """A run does not begin before every thermal zone is below."""


class Pins(_Table):
    """Pins of the header that the owner wired, by BCM number (see pins.py)."""

    sync_gpio: Annotated[int, Field(ge=0, le=53)] | None = None
    lamp_gpio: Annotated[int, Field(ge=0, le=53)] | None = None
    fan_gpio: Annotated[int, Field(ge=0, le=53)] | None = None
    fan_speed: Annotated[float, Field(gt=0, le=1)] = 1.0


class DeviceProfile(_Table):
    """One board. `sensors` are probed in order; `backends` is the order of preference; `idle_s` the idle window before
    a run. `memory_bytes` are the sizes that are sold, `memory_bandwidth` the maker's figure in bytes per second."""

    id: Identifier
    title: Title
    match: MatchRules = MatchRules()
    sensors: tuple[SensorUse, ...]
    backends: Annotated[tuple[Identifier, ...], Field(min_length=1)]
    idle_s: Annotated[float, Field(ge=0.5, le=600)] = 3.0
    limits: Limits = Limits()
    pins: Pins = Pins()
    memory_bytes: tuple[Annotated[int, Field(ge=2**26, le=2**42)], ...] = ()
    memory_bandwidth: Annotated[float, Field(gt=1e8, lt=1e13)] | None = None
    power_modes: tuple[Title, ...] = ()
    without_meter: Title | None = None
    """Why the board has no meter of its own, and what to attach."""


def profile_folder() -> Path:
    """Where the profiles are: inside the installed package, or at the top of a checkout. Raises NotFound."""
    for folder in (_HERE / "device_profiles", _HERE.parent.parent / "device_profiles"):
        if folder.is_dir():
            return folder
    raise NotFound("the folder device_profiles is missing", "this is a packaging fault: reinstall joulemark")


def own_folder(roots: Roots) -> Path:
    """Where the owner of this board puts profiles of their own: they win over shipped ones of the same name."""
    return roots.etc / "joulemark" / "device_profiles"


def load_profiles(folder: Path | None = None, own: Path | None = None) -> tuple[DeviceProfile, ...]:
    """All profiles of a folder (the shipped one by default) and of the owner's, by id. Raises BadInput naming the file
    and the field."""
    folder = folder or profile_folder()
    files = {path.stem: path for place in (folder, own) if place for path in place.glob("*.toml")}
    if not files:
        raise NotFound(f"there is no device profile in {folder}", "add a TOML file, see device_profiles/generic.toml")
    return tuple(read_profile(path) for _, path in sorted(files.items()))


def read_profile(path: Path) -> DeviceProfile:
    """One profile. Its id must be the file's name, its sensors plug-ins. Raises BadInput naming the file and the
    field."""
    hint = f"correct {path}; device_profiles/generic.toml explains the fields"
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_PROFILE_BYTES + 1)
        if len(content) > _MAX_PROFILE_BYTES:
            raise BadInput(f"the device profile {path.name} is larger than {_MAX_PROFILE_BYTES} bytes", hint)
        profile = DeviceProfile.model_validate(tomllib.loads(content.decode("utf-8")))
    except OSError as error:
        raise BadInput(
            f"the device profile {path} cannot be read: {error.strerror}", "check its permissions"
        ) from error
    except ValidationError as error:
        raise BadInput(f"the device profile {path.name} is malformed: {_first_fault(error)}", hint) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, numbers of too many digits
        raise BadInput(f"the device profile {path.name} is not valid TOML: {str(error)[:300]}", hint) from error
    _check(profile, path, hint)
    return profile


def _first_fault(error: ValidationError) -> str:
    fault = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in fault["loc"]) or "the whole file"
    return f"{field}: {fault['msg']}"


def _check(profile: DeviceProfile, path: Path, hint: str) -> None:
    if profile.id != path.stem:
        raise BadInput(f"the device profile {path.name} is malformed: id: {profile.id!r} is not the file's name", hint)
    for package, field, wanted in (
        ("joulemark_agent.sensors", "sensors", [sensor.use for sensor in profile.sensors]),
        ("joulemark_agent.backends", "backends", profile.backends),
    ):
        known = plugins.names(package)
        for index, name in enumerate(wanted):
            if name not in known:
                fault = f"{field}.{index}: there is no {name!r}; known: {', '.join(known)}"
                raise BadInput(f"the device profile {path.name} is malformed: {fault}", hint)
            if name in wanted[:index]:
                raise BadInput(
                    f"the device profile {path.name} is malformed: {field}.{index}: {name!r} is twice there", hint
                )


def match(profiles: Sequence[DeviceProfile], roots: Roots, name: str | None = None) -> DeviceProfile:
    """The most specific profile that fits this machine, or the one called `name` whether it fits or not.

    Raises NotFound when there is none, BadInput when two fit equally well.
    """
    if name is not None:
        for profile in profiles:
            if profile.id == name:
                return profile
        raise NotFound(f"there is no device profile {name!r}", f"known: {', '.join(p.id for p in profiles)}")
    ranked = [(rank, profile) for profile in profiles if (rank := specificity(profile.match, roots)) is not None]
    if not ranked:
        raise NotFound("no device profile fits this machine", "add one with an empty [match], as generic.toml has it")
    best = max(rank for rank, _ in ranked)
    winners = [profile for rank, profile in ranked if rank == best]
    if len(winners) > 1:
        names = " and ".join(profile.id for profile in winners)
        raise BadInput(f"the device profiles {names} fit this machine equally well", "make the rules of one more exact")
    return winners[0]


def specificity(rules: MatchRules, roots: Roots) -> tuple[float, int, int, int] | None:
    """How exactly the rules name this machine, higher is more exact; None when one of them does not hold."""
    board = machine.dt_compatible(roots)
    places = [board.index(name) for name in rules.dt_compatible if name in board]
    product = (machine.dmi_product(roots) or "").casefold()
    holds = (
        (not rules.arch or roots.arch in rules.arch)
        and (not rules.dt_compatible or bool(places))
        and (not rules.dmi_product or product in [name.casefold() for name in rules.dmi_product])
        and all((roots.sys / path).exists() for path in rules.sys_path)
    )
    if not holds:
        return None
    # a board's first name is its most exact one: place 0 ranks 1, later places less, no rule 0
    tree = 1 / (1 + min(places)) if places else 0.0
    return tree, int(bool(rules.dmi_product)), len(rules.sys_path), int(bool(rules.arch))


def device_facts(
    profile: DeviceProfile,
    roots: Roots,
    device_id: str,
    name: str,
    meters: Sequence[Channel],
    absent: Mapping[str, Absent],
    memory_bandwidth: Metric,
) -> DeviceFacts:
    """What this board is. `meters` are the power and energy channels that were found, `absent` why others were not."""
    return DeviceFacts(
        device_id=device_id,
        name=name,
        profile=profile.id,
        title=machine.model_name(roots) or profile.title,
        arch=roots.arch,
        cpu=machine.cpu_model(roots),
        cores=machine.usable_cores(roots),
        cores_online=len(machine.online_cpus(roots)) or None,
        memory_bytes=machine.memory_bytes(roots),
        memory_bandwidth=memory_bandwidth,
        kernel=machine.kernel(roots),
        operating_system=machine.operating_system(roots),
        governor=machine.governor(roots),
        power_mode=tuning.power_mode(roots),
        clocks=tuning.clock_limits(roots),
        agent_version=__version__,
        meters=tuple(channel for channel in meters if channel.quantity in ("power", "energy")),
        absent=dict(absent),
    )
