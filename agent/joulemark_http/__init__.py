"""What the agent's and the host's HTTP servers share: sockets, deadlines, bodies in bounds, errors as answers, the described interface.

Everything from outside is hostile until it was parsed with bounds; those bounds are here, once. It knows `joulemark`, no program.
"""
