"""Joulemark's shared vocabulary: the words that the agent, the exporter and the host speak to each other.

Standard library and pydantic only, so that a board can afford it. It is not aware of any engine, sensor or web framework.
"""

__version__ = "0.1.0"
