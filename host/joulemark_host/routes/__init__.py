"""The host's routes, one file for each thing they are about. Each translates between HTTP and one part of the host and holds no state.

Every file has `create_router(…, access)`. A route says by its guard who may use it; what has none is public, and a test lists those.
"""
