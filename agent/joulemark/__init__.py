"""Joulemark's shared vocabulary: the words that the agent, the exporter and the host speak to each other.

Standard library and pydantic only, so that a board can afford it. It is not aware of any engine, sensor or web framework.
"""

import os

__version__ = "0.1.0"

# Since 1.29 onnxruntime's wheels for Linux report what they run to Microsoft: a thread of their own, a device id and a queue on the disk,
# an upload in the middle of a measurement. It is decided once, before the engine is loaded, by this variable alone (its pull requests
# 27379 and 29843). Hugging Face's hub counts its callers too. Here, because every process of ours begins here, and its children inherit it.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
