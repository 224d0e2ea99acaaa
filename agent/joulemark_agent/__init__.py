"""The device program: stores artifacts and packs, runs evaluations in a worker process, samples sensors, reports records.

Light by rule: no torch, transformers or datasets; engines are imported only inside the worker process.
"""

import sys

# httpx imports its own command line, with rich and pygments, where these are installed: 3 MB that an agent on a board has no use for. With
# this it takes the way that it takes where they are not.
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
