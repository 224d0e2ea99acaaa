"""The workstation's tools for bringing Joulemark onto boards: wheels that need no compiler there, and what checks and carries them.

Imports `joulemark` and none of the other programs. Nothing here runs on a board.
"""
