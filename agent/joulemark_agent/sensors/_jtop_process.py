"""A process of its own that asks jetson-stats and prints one JSON object a line: power by rail in watts, and what slows the module.

jetson-stats (AGPL-3.0) is imported here and nowhere else; sensors/jetson_stats.py only reads these lines. Its service must run
(`sudo jtop --install-service`). Errors are one line with the key "error". Ends when nobody reads any more.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def rails_of(power: Any) -> dict[str, float]:
    """Watts by rail; "total" is jetson-stats' own sum. It gives milliwatts; its `avg` is no integral and is not used."""
    found = {str(name): float(rail["power"]) / 1000 for name, rail in power["rail"].items() if "power" in rail}
    if "power" in power.get("tot", {}):
        found["total"] = float(power["tot"]["power"]) / 1000
    return found


def main(interval_s: float) -> int:
    """Print lines until the reader goes."""
    try:
        from jtop import jtop  # pyright: ignore[reportMissingImports,reportUnknownVariableType]
    except ImportError as error:
        print(json.dumps({"error": f"jetson-stats is not installed: {error}"}), flush=True)  # noqa: T201
        return 1
    try:
        with jtop(interval=interval_s) as board:
            while board.ok():
                print(json.dumps({"rails": rails_of(board.power)}), flush=True)  # noqa: T201
    except BrokenPipeError:
        return 0
    except Exception as error:  # noqa: BLE001 - whatever jetson-stats raises must reach the agent as words
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
