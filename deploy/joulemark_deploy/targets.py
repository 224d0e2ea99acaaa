"""Which processor a board has, and what of it a compiler may use.

Owns: the instruction sets, and the boards' short names on the command line. Not aware of how anything is built.

armv8.0 runs on every 64-bit board. armv8.2-dotprod uses the dot product and half-precision instructions of Cortex-A76 (Raspberry Pi 5) and
Cortex-A78AE (Jetson Orin); on a Cortex-A72 (Raspberry Pi 4) it dies with SIGILL. Xavier NX (Carmel) has no dot product: armv8.0.
"""

from __future__ import annotations

from dataclasses import dataclass

from joulemark.errors import NotFound

GLIBC_FLOOR = (2, 27)
"""Ubuntu 18.04, JetPack 4: the oldest system that a board of ours has."""


@dataclass(frozen=True)
class InstructionSet:
    """`cpu` is zig's name of the processor whose instructions the kernels may use (None: those of every ARMv8 core), `extensions` what that
    allows, `hwcap` the kernel's bits for that (AT_HWCAP, asm/hwcap.h), `qemu_cpu` the emulated processor that has exactly them."""

    name: str
    cpu: str | None
    extensions: frozenset[str]
    hwcap: int
    qemu_cpu: str


@dataclass(frozen=True)
class Target:
    """A board on the command line. `pythons` are those that its usual systems bring along."""

    name: str
    title: str
    instructions: InstructionSet
    pythons: tuple[str, ...]


_ATOMICS, _FPHP, _ASIMDHP, _LRCPC, _ASIMDDP = 1 << 8, 1 << 9, 1 << 10, 1 << 15, 1 << 20
ARMV8 = InstructionSet("armv8.0", None, frozenset(), 0, "cortex-a72")
DOTPROD = InstructionSet(
    "armv8.2-dotprod",
    "cortex_a76",
    frozenset({"dotprod", "fp16"}),
    _ATOMICS | _FPHP | _ASIMDHP | _LRCPC | _ASIMDDP,
    "cortex-a76",
)
INSTRUCTION_SETS = {found.name: found for found in (ARMV8, DOTPROD)}

_RASPBERRY_PI_OS = ("3.11", "3.13")
_JETPACK_6 = ("3.10",)
TARGETS = {
    target.name: target
    for target in (
        Target("arm64", "any 64-bit ARM board", ARMV8, ("3.10", "3.11", "3.13")),
        Target(
            "arm64-dotprod", "any 64-bit ARM board with dot product instructions", DOTPROD, ("3.10", "3.11", "3.13")
        ),
        Target("jetson-nano", "Jetson Nano (its own Python is 3.6: use the bundle)", ARMV8, ()),
        Target("xavier-nx", "Jetson Xavier NX (its own Python is 3.6 or 3.8: use the bundle)", ARMV8, ()),
        Target("orin", "Jetson Orin Nano, Orin NX, AGX Orin with JetPack 6", DOTPROD, _JETPACK_6),
        Target("pi3", "Raspberry Pi 3", ARMV8, _RASPBERRY_PI_OS),
        Target("pi4", "Raspberry Pi 4, 400", ARMV8, _RASPBERRY_PI_OS),
        Target("pi5", "Raspberry Pi 5, 500", DOTPROD, _RASPBERRY_PI_OS),
        Target("pi-zero-2-w", "Raspberry Pi Zero 2 W", ARMV8, _RASPBERRY_PI_OS),
    )
}


def target_for_processor(hwcap: int) -> Target:
    """The target whose engine is the fastest that a processor with these capabilities can run."""
    return TARGETS["arm64-dotprod" if hwcap & DOTPROD.hwcap == DOTPROD.hwcap else "arm64"]


def target_of(name: str) -> Target:
    """Raises NotFound, naming the known ones."""
    if name not in TARGETS:
        raise NotFound(f"there is no target {name!r}", f"known: {', '.join(TARGETS)}")
    return TARGETS[name]
