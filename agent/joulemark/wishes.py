"""How a person wants boards to be set while a run lasts, from the words of a command line. Not aware of boards."""

from __future__ import annotations

from pydantic import ValidationError

from joulemark.errors import BadInput
from joulemark.wire import Tuning


def tuning_of(governor: str | None, power_mode: str | None, fixed_clocks: bool) -> Tuning | None:
    """The wish, None when there is none. Raises BadInput for a name that no board can have."""
    try:
        wanted = Tuning(governor=governor, power_mode=power_mode, fixed_clocks=fixed_clocks)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        raise BadInput(
            f"{fault['loc'][0]}: {fault['msg']}", "`joulemark profile show` on the board says what it has"
        ) from error
    return None if wanted == Tuning() else wanted
