"""The engine plug-in contract: what boards run an artifact with, used here to look at what was written before anybody relies on it.

An engine module offers

    FORMAT: str                                              the manifest's format that it opens
    Engine(path, threads)                                    opens the file; raises EngineFailed when the engine refuses
        .tokenize(text) -> list[int]                         as the board tokenizes a prompt, special tokens included
        .logits(tokens) -> float32 (tokens, vocabulary)      of every position
        .close()

They run in a process of their own (`probe`), because an engine can crash on a file that it should have refused.
"""
